"""Encoding on a GPU: a program finds the scales of a few blocks and their codes in registers.

The second level of scales is left to torch's operations: there is one scale for 64 weights, and its offset, the mean of
all, would need a second pass anyway.

Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.errors import FormatError
from halfbyte.formats import get_codebook
from halfbyte.formats.packing import packed_size
from halfbyte.kernels.triton.weights import check_block_size, takes

_TILE = 1024  # weights of a program, or one block where that is larger


@triton.jit
def nearest_rank(x, thresholds, BITS: tl.constexpr):
    """How many of the 2**BITS - 1 ascending thresholds lie below x; NaN is above none."""
    rank = tl.zeros_like(x).to(tl.int32)
    for level in tl.static_range(BITS):
        step = 1 << (BITS - 1 - level)
        rank += tl.where(x > tl.load(thresholds + rank + (step - 1)), step, 0)
    return rank


@triton.jit
def held_up(absmax):
    """At 1e-38 or above, or NaN. The constant is below float32's normal numbers, so Triton would make it a float64."""
    tiny = tl.cast(1e-38, tl.float32)
    return tl.where(absmax < tiny, tiny, absmax)


@triton.jit
def _quantize_kernel(
    w,
    thresholds,
    by_rank,
    codes,
    scales,
    count,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    left = count - first
    row = tl.arange(0, BLOCKS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(w + first + index, mask=index < left, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=1)
    # The largest of numbers that are not all numbers is not one: tl.max alone may leave a NaN out.
    absmax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), absmax)
    held = held_up(absmax)
    # A whole block multiplies by the reciprocal, a partial one divides (formats/blockwise.py).
    whole = (row + 1) * BLOCK <= left
    inverse = tl.div_rn(tl.zeros_like(held) + 1.0, held)[:, None]
    if left < BLOCKS * BLOCK:
        x = tl.where(whole[:, None], x * inverse, tl.div_rn(x, held[:, None] + tl.zeros_like(x)))
    else:
        x = x * inverse
    tl.store(scales + first // BLOCK + row, tl.where(whole, absmax, held), mask=row * BLOCK < left)
    code = tl.load(by_rank + nearest_rank(x, thresholds, BITS)).to(tl.int32)
    if BITS == 4:
        high, low = tl.split(tl.reshape(code, [BLOCKS, BLOCK // 2, 2]))
        pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(codes + (first >> 1) + pair, ((high << 4) | low).to(tl.uint8), mask=2 * pair < left)
    else:
        tl.store(codes + first + index, code.to(tl.uint8), mask=index < left)


def quantize(w: torch.Tensor, format: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`halfbyte::quantize`; see `formats.blockwise.quantize`."""
    book = get_codebook(format)
    check_block_size(block_size)
    if not takes(w.dtype, w.device):
        if w.dtype not in (torch.float64, torch.bfloat16):
            raise FormatError(f"cannot quantize a tensor of {w.dtype}; choose float32, bfloat16, float16 or float64")
        w = w.float()
    flat = w.detach().reshape(-1).contiguous()
    count, device = flat.numel(), flat.device
    codes = torch.empty(packed_size(count, book.bits), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-count // block_size), dtype=torch.float32, device=device)
    if not count:
        return codes, scales
    thresholds, by_rank = book.thresholds(device), book.codes(device)
    most, tile = 1 << book.bits, max(_TILE, block_size)
    _quantize_kernel[(triton.cdiv(count, tile),)](
        flat,
        torch.nn.functional.pad(thresholds, (0, most - len(thresholds)), value=float("inf")),
        torch.nn.functional.pad(by_rank, (0, most - len(by_rank))),
        codes,
        scales,
        count,
        BITS=book.bits,
        BLOCK=block_size,
        BLOCKS=tile // block_size,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scales
