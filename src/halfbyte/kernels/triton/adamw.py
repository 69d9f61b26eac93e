"""AdamW steps on a GPU: one launch for all slots of a kind and of equal dtypes.

Like the native step, a launch takes a table of pointers, so thousands of small matrices cost one launch. A program
steps one block of 256 elements, which is a scale's block of 8-bit state, so codes are decoded, updated and encoded in
registers. The nearest code is found by bisection of the map's thresholds. 4-bit states run on the reference.

The table stays on the device from step to step. Gradients lie elsewhere each time, above all in a graph, which has
memory of its own; their pointers are written into a copy of the table by a kernel that takes them as arguments, so that
a graph holds them, and no host memory has to outlive it.

Importing this module imports triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from halfbyte.errors import RequestError
from halfbyte.formats.codebooks import MOMENT1_8BIT, MOMENT2_8BIT
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import BLOCK_8BIT, Options, Slot, is_capturing, refuse_capture
from halfbyte.kernels.triton.quantize import held_up, nearest_rank
from halfbyte.kernels.triton.weights import takes

_POINTERS = 7  # param, grad, moment1, moment2, scale1, scale2, master
_GRAD = 1  # the pointer that changes
_WIDTH = 11  # int64s a slot in the table: pointers, then count, first, row of options and keys, first program


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
    options,
    keys,
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
    block = tl.program_id(0) - tl.load(row + 10)
    o = options + tl.load(row + 9) * 10
    count = tl.where(tl.load(o) == tl.load(o), tl.load(row + 7), 0)  # a scale of NaN: nothing is to be changed
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
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
        before1, before2 = tl.load(scale1), tl.load(scale2)
        m = tl.where(inside, _decode(m, map1, before1), 0.0)
        v = tl.where(inside, _decode(v, map2, before2), 0.0)
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
        key = keys + tl.load(row + 9) * 2
        noise = _noise(at + tl.load(row + 8), tl.load(key), tl.load(key + 1))
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
        changes = block * BLOCK < count  # no mask: Triton 3.2's interpreter has none for a single number
        tl.store(scale1, tl.where(changes, tl.where(whole, most1, held1), before1))
        tl.store(scale2, tl.where(changes, tl.where(whole, most2, held2), before2))
        tl.store(moment1, nearest_rank(x, thresholds1, 8).to(tl.uint8), mask=inside)
        tl.store(moment2, nearest_rank(y, thresholds2, 8).to(tl.uint8), mask=inside)
    else:
        tl.store(moment1, m, mask=inside)
        tl.store(moment2, v, mask=inside)


class TritonBatch:
    """A `halfbyte.kernels.slots.DeviceBatch` of slots on one device; those of 4-bit state cannot be captured."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._reference = ReferenceBatch(slots)
        self._launches: dict[tuple[Any, ...], _Launch] = {}  # of the last step

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """See `Batch.norms`."""
        return self._reference.norms(grads)

    def squares(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """See `DeviceBatch.squares`."""
        return self._reference.squares(grads)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """See `Batch.step`."""
        others = [slot if grad is not None and not _fits(slot, grad) else None for slot, grad in self._pairs(grads)]
        for at, slot in enumerate(others):
            if slot is not None:
                ReferenceBatch([slot]).step([grads[at]], options, [which[at]], keys[at : at + 1])
        device = self.slots[0].param.device
        numbers = _to_device(np.array([options[number] for number in which], dtype=np.float32), device)
        fitting = [None if slot is not None else grad for slot, grad in zip(others, grads, strict=True)]
        weights1 = [options[number].weight1 for number in which]
        self._step(fitting, numbers, weights1, _to_device(np.ascontiguousarray(keys).view(np.int32), device))

    def step_on_device(
        self,
        grads: Sequence[torch.Tensor | None],
        options: torch.Tensor,
        weights1: Sequence[float],
        keys: torch.Tensor,
    ) -> None:
        """See `DeviceBatch.step_on_device`."""
        for slot, grad in self._pairs(grads):
            if grad is not None and not _fits(slot, grad):
                raise RequestError(
                    f"a {slot.kind} state of a {slot.param.dtype} parameter of shape {tuple(slot.param.shape)} and "
                    f"strides {slot.param.stride()} is stepped by torch's operations, which take numbers from the "
                    "host; make the optimizer without capturable=True."
                )
        self._step(grads, options, weights1, keys)

    def _pairs(self, grads: Sequence[torch.Tensor | None]) -> Iterator[tuple[Slot, torch.Tensor | None]]:
        return zip(self.slots, grads, strict=True)

    def _step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: torch.Tensor,
        weights1: Sequence[float],
        keys: torch.Tensor,
    ) -> None:
        whole = [None if grad is None else grad.contiguous() for grad in grads]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, (slot, grad) in enumerate(self._pairs(whole)):
            if grad is not None:
                kind = (slot.kind == "8bit", weights1[at] >= 0.5, slot.param.dtype, grad.dtype, slot.master is not None)
                groups.setdefault(kind, []).append(at)
        found = {}
        for kind, members in groups.items():
            key = (kind, tuple(members))
            found[key] = self._launches.get(key) or _Launch(kind, members, self.slots)
            with torch.cuda.device_of(self.slots[0].param):
                found[key]([whole[at] for at in members], options, keys)
        self._launches = found


class _Launch:
    """One launch: of the same slots, for any gradients.

    Args:
        kind: coded, large weight, dtype of parameters, dtype of gradients, with masters.
        members: positions in `slots`, and rows of options and keys.
        slots: all of a batch.
    """

    def __init__(self, kind: tuple[Any, ...], members: Sequence[int], slots: Sequence[Slot]) -> None:
        self._kind, self._slots = kind, [slots[at] for at in members]
        self._device = self._slots[0].param.device
        refuse_capture(self._device)
        blocks = np.array([-(-slot.count // BLOCK_8BIT) for slot in self._slots], dtype=np.int64)
        self._rows = np.zeros((len(members), _WIDTH), dtype=np.int64)
        self._rows[:, _POINTERS:] = [
            (slot.count, slot.first, at, 0) for slot, at in zip(self._slots, members, strict=True)
        ]
        self._rows[:, -1] = blocks.cumsum() - blocks
        self._owners = _to_device(np.repeat(np.arange(len(members), dtype=np.int32), blocks), self._device)
        self._maps = _maps(self._device)
        self._base = self._table = torch.empty(0)
        self._gradients: list[int] = []

    def __call__(self, grads: Sequence[Any], options: torch.Tensor, keys: torch.Tensor) -> None:
        coded, large, param_dtype, grad_dtype, master = self._kind
        _step[(len(self._owners),)](
            self._filled(grads),
            self._owners,
            options,
            keys,
            *self._maps,
            WIDTH=_WIDTH,
            BLOCK=BLOCK_8BIT,
            CODED=coded,
            LARGE_WEIGHT=large,
            PARAM_BF16=param_dtype == torch.bfloat16,
            GRAD_BF16=grad_dtype == torch.bfloat16,
            MASTER=master,
            enable_fp_fusion=False,
        )

    def _filled(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """The table with pointers to these gradients."""
        capturing = is_capturing(self._device)
        rows = self._rows.copy()
        for row, slot in zip(rows, self._slots, strict=True):
            states = (slot.moment1, slot.moment2, slot.scale1, slot.scale2, slot.master)
            row[0] = slot.param.data_ptr() + slot.first * slot.param.element_size()
            row[_GRAD + 1 : _POINTERS] = [0 if tensor is None else tensor.data_ptr() for tensor in states]
        if not self._gradients or not np.array_equal(rows, self._rows):
            refuse_capture(self._device)
            self._rows, self._base, self._gradients = rows, _to_device(rows, self._device), []
        gradients = [
            grad.data_ptr() + slot.first * grad.element_size() for grad, slot in zip(grads, self._slots, strict=True)
        ]
        if gradients == self._gradients and not capturing:
            return self._table
        table = self._base.clone()
        torch._foreach_add_(table[:, _GRAD].unbind(), gradients)
        if not capturing:  # a graph's memory is the graph's
            self._table, self._gradients = table, gradients
        return table


def _fits(slot: Slot, grad: torch.Tensor) -> bool:
    fits = slot.kind != "4bit" and slot.param.is_contiguous()
    return fits and all(takes(tensor.dtype, tensor.device) for tensor in (slot.param, grad))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    # From pageable memory the host would wait until the device has done all that it was told before.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@functools.cache
def _maps(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Values by code of both moments, then the thresholds between them."""
    books = MOMENT1_8BIT, MOMENT2_8BIT
    thresholds = [torch.nn.functional.pad(book.thresholds(device), (0, 1), value=float("inf")) for book in books]
    return *(book.table(device) for book in books), *thresholds
