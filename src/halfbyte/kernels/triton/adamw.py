"""AdamW steps on a GPU: one launch for all slots of a kind and of equal dtypes.

Like the native step, a launch takes a table of pointers, so thousands of small matrices cost one launch. A program
steps one block of 256 elements, which is a scale's block of 8-bit state, so codes are decoded, updated and encoded in
registers. The nearest code is found by bisection of the map's thresholds. 4-bit states run on the reference.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from halfbyte.formats.codebooks import MOMENT1_8BIT, MOMENT2_8BIT
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import BLOCK_8BIT, Options, Slot
from halfbyte.kernels.triton.quantize import held_up, nearest_rank
from halfbyte.kernels.triton.weights import takes

_POINTERS = 7  # param, grad, moment1, moment2, scale1, scale2, master
_WIDTH = 12  # int64s a slot in the table: pointers, then count, first, which options, two keys


@triton.jit
def _decode(codes, map_pointer, scale):
    return tl.load(map_pointer + codes.to(tl.int32)) * scale


@triton.jit
def _noise(index, key0, key1):
    """As csrc/adamw.h: a hash of a counter, 16 bits."""
    hashed = (index.to(tl.uint32) * 0x9E3779B1) ^ key0.to(tl.uint32)
    hashed = (hashed ^ (hashed >> 16)) * 0x7FEB352D
    hashed = (hashed ^ (hashed >> 15) ^ key1.to(tl.uint32)) * 0x846CA68B
    return hashed >> 16


@triton.jit
def _step(
    table,
    owners,
    starts,
    options,
    map1,
    map2,
    thresholds1,
    thresholds2,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CODED: tl.constexpr,
    LARGE_WEIGHT: tl.constexpr,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    MASTER: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * WIDTH
    block = tl.load(starts + tl.program_id(0)).to(tl.int64)
    count = tl.load(row + 7)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    o = options + tl.load(row + 9) * 10
    param = tl.load(row).to(tl.pointer_type(tl.bfloat16 if PARAM_BF16 else tl.float32)) + at
    grad = tl.load(row + 1).to(tl.pointer_type(tl.bfloat16 if GRAD_BF16 else tl.float32)) + at
    moment1 = tl.load(row + 2).to(tl.pointer_type(tl.uint8 if CODED else tl.float32)) + at
    moment2 = tl.load(row + 3).to(tl.pointer_type(tl.uint8 if CODED else tl.float32)) + at
    source = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + at if MASTER else param
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * tl.load(o)
    m, v = tl.load(moment1, mask=inside, other=0), tl.load(moment2, mask=inside, other=0)
    weight1, weight2 = tl.load(o + 2), tl.load(o + 4)
    if CODED:
        scale1 = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + block
        scale2 = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block
        m = tl.where(inside, _decode(m, map1, tl.load(scale1)), 0.0)
        v = tl.where(inside, _decode(v, map2, tl.load(scale2)), 0.0)
        m = tl.fma(g, weight1, m * tl.load(o + 1))
    elif LARGE_WEIGHT:
        m = tl.fma(weight1 - 1.0, g - m, g)
    else:
        m = tl.fma(weight1, g - m, m)
    v = tl.fma(g * weight2, g, v * tl.load(o + 3))
    root = tl.sqrt_rn(v)
    root = root * tl.load(o + 7) if CODED else tl.div_rn(root, tl.load(o + 6) + tl.zeros_like(root))
    p = tl.load(source, mask=inside, other=0.0).to(tl.float32) * tl.load(o + 9)
    p = p + tl.div_rn(m * tl.load(o + 8), root + tl.load(o + 5))
    if MASTER:
        tl.store(source, p, mask=inside)
        tl.store(param, p.to(tl.bfloat16), mask=inside)
    elif PARAM_BF16:
        bits = p.to(tl.uint32, bitcast=True)
        noise = _noise(at + tl.load(row + 8), tl.load(row + 10), tl.load(row + 11))
        noise = tl.where((bits & 0x7FFFFFFF) >= 0x7F7F0000, 0, noise)
        tl.store(param, ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(param, p, mask=inside)
    if CODED:
        whole = (block + 1) * BLOCK <= count
        most1, most2 = tl.max(tl.abs(m), axis=0), tl.max(v, axis=0)
        held1, held2 = held_up(most1), held_up(most2)
        ones = tl.zeros_like(m) + 1.0
        # A whole block multiplies by the reciprocal, a partial one divides (formats/blockwise.py).
        x = tl.where(whole, m * tl.div_rn(ones, held1 * ones), tl.div_rn(m, held1 * ones))
        y = tl.where(whole, v * tl.div_rn(ones, held2 * ones), tl.div_rn(v, held2 * ones))
        tl.store(scale1, tl.where(whole, most1, held1))
        tl.store(scale2, tl.where(whole, most2, held2))
        tl.store(moment1, nearest_rank(x, thresholds1, 8).to(tl.uint8), mask=inside)
        tl.store(moment2, nearest_rank(y, thresholds2, 8).to(tl.uint8), mask=inside)
    else:
        tl.store(moment1, m, mask=inside)
        tl.store(moment2, v, mask=inside)


class TritonBatch:
    """A `halfbyte.kernels.slots.Batch` of float32 and 8-bit slots on one device."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._reference = ReferenceBatch(slots)

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """See `Batch.norms`."""
        return self._reference.norms(grads)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """See `Batch.step`."""
        groups: dict[tuple[Any, ...], list[tuple[Slot, torch.Tensor, int, list[int]]]] = {}
        for slot, grad, number, key in zip(self.slots, grads, which, keys.tolist(), strict=True):
            if grad is None:
                continue
            fits = slot.kind != "4bit" and slot.param.is_contiguous()
            if not fits or not all(takes(tensor.dtype, tensor.device) for tensor in (slot.param, grad)):
                ReferenceBatch([slot]).step([grad], options, [number], np.array([key], dtype=np.uint32))
                continue
            grad = grad.contiguous()
            large = options[number].weight1 >= 0.5
            shared = (slot.kind == "8bit", large, slot.param.dtype, grad.dtype, slot.master is not None)
            groups.setdefault(shared, []).append((slot, grad, number, key))
        for shared, members in groups.items():
            with torch.cuda.device_of(members[0][0].param):
                _launch(shared, members, options)


def _launch(shared: tuple[Any, ...], members: list[Any], options: Sequence[Options]) -> None:
    coded, large, param_dtype, grad_dtype, master = shared
    device = members[0][0].param.device
    rows = np.zeros((len(members), _WIDTH), dtype=np.int64)
    blocks = np.array([-(-slot.count // BLOCK_8BIT) for slot, *_ in members], dtype=np.int64)
    for row, (slot, grad, number, key) in zip(rows, members, strict=True):
        tensors = (slot.moment1, slot.moment2, slot.scale1, slot.scale2, slot.master)
        row[0] = slot.param.data_ptr() + slot.first * slot.param.element_size()
        row[1] = grad.data_ptr() + slot.first * grad.element_size()
        row[2:_POINTERS] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        row[_POINTERS:] = [slot.count, slot.first, number, *key]
    owners = np.repeat(np.arange(len(members), dtype=np.int32), blocks)
    starts = np.arange(len(owners), dtype=np.int64) - np.repeat(blocks.cumsum() - blocks, blocks)

    def to_device(array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(array)
        # From pageable memory the host would wait until the device has done all that it was told before.
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    _step[(len(owners),)](
        to_device(rows),
        to_device(owners),
        to_device(starts),
        to_device(np.array(options, dtype=np.float32)),
        MOMENT1_8BIT.table(device),
        MOMENT2_8BIT.table(device),
        _padded(MOMENT1_8BIT.thresholds(device)),
        _padded(MOMENT2_8BIT.thresholds(device)),
        WIDTH=_WIDTH,
        BLOCK=BLOCK_8BIT,
        CODED=coded,
        LARGE_WEIGHT=large,
        PARAM_BF16=param_dtype == torch.bfloat16,
        GRAD_BF16=grad_dtype == torch.bfloat16,
        MASTER=master,
        enable_fp_fusion=False,
    )


def _padded(thresholds: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(thresholds, (0, 1), value=float("inf"))
