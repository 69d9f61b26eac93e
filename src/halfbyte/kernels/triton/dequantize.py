"""Decoding on a GPU: a whole weight, or the rows of an embedding that are asked for.

A whole weight is cut into tiles of whole blocks (or parts of one large block), whatever its shape: codes and scales are
read in order and values written in order, so the speed is that of memory. A thread reads four bytes of codes and
writes the 16 bytes that they become in 16 bits.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.errors import ShapeError
from halfbyte.kernels import reference
from halfbyte.kernels.triton.weights import Weight, code_at, packed_weight, scale_at, takes, value_at
from halfbyte.kernels.tuning import gpu_tuning

_ROW_TILE = 1024


@triton.jit
def _dequantize_kernel(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    out,
    start,
    scale_start,
    end,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    first = tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
    row = tl.arange(0, ROWS)
    block = scale_start + (first + row * COLUMNS) // BLOCK
    inside_row = first + row * COLUMNS < end
    scale = scale_at(scales, scale_absmax, scale_offset, scale_table, block, inside_row, SCALE_BITS)[:, None]
    left = end - first
    if BITS == 4:
        pair = row[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        if EVEN:
            byte = tl.load(codes + (first >> 1) + pair).to(tl.int32)
        else:
            byte = tl.load(codes + (first >> 1) + pair, mask=2 * pair < left, other=0).to(tl.int32)
        values = tl.join(value_at(table, byte, 4) * scale, value_at(table, byte, 0) * scale)
        values = tl.reshape(values, [ROWS, COLUMNS])
    else:
        at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        byte = tl.load(codes + first + at, mask=at < left, other=0).to(tl.int32)
        values = tl.load(table + byte) * scale
    index = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    to = out + (first - start) + index
    if EVEN:
        tl.store(to, values.to(out.dtype.element_ty))
    else:
        tl.store(to, values.to(out.dtype.element_ty), mask=(index < left) & (first + index >= start))


@triton.jit
def _rows_kernel(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    rows,
    out,
    columns,
    limit,
    start,
    scale_start,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < tl.where((row >= 0) & (row < limit), columns, 0)
    at = start + row * columns + column
    scale = scale_at(scales, scale_absmax, scale_offset, scale_table, scale_start + at // BLOCK, inside, SCALE_BITS)
    value = tl.load(table + code_at(codes, at, inside, BITS)) * scale
    value = tl.where(inside, value, float("nan"))
    to = out + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(to, value.to(out.dtype.element_ty), mask=column < columns)


def dequantize(*args: Any) -> torch.Tensor:
    """`halfbyte::dequantize`: packed weight, shape, dtype -> `dtype` [*shape]."""
    shape, dtype = args[9:]
    if min(shape, default=0) < 0:
        raise ShapeError(f"a weight cannot have the shape {list(shape)}")
    count = math.prod(shape)
    if not takes(dtype, args[0].device) or not count:
        return reference.OPS["dequantize"](*args)
    return decode(packed_weight(args, count), count, dtype).view(shape)


def decode(weight: Weight, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `count` weights: `dtype` [count], which kernels take."""
    device = weight.pointers[0].device
    out = torch.empty(count, dtype=dtype, device=device)
    tuning = gpu_tuning(device)
    columns = min(weight.block_size, tuning.decode_tile)
    end = weight.start + count
    _dequantize_kernel[(triton.cdiv(end, tuning.decode_tile),)](
        *weight.pointers,
        out,
        weight.start,
        weight.scale_start,
        end,
        BITS=weight.bits,
        SCALE_BITS=weight.scale_bits,
        BLOCK=weight.block_size,
        ROWS=tuning.decode_tile // columns,
        COLUMNS=columns,
        EVEN=weight.start == 0 and count % tuning.decode_tile == 0,
        num_warps=tuning.decode_tile // 1024,
        enable_fp_fusion=False,
    )
    return out


def dequantize_rows(*args: Any) -> torch.Tensor:
    """`halfbyte::dequantize_rows`: packed [N, columns], rows int [...], dtype -> `dtype` [..., columns].

    A row that the weight does not have comes back as NaN: to raise, the host would have to wait for the index.
    """
    columns, rows, dtype = args[9:]
    codes, start = args[0], args[7]
    looked_up = takes(dtype, codes.device) and rows.dtype in (torch.int64, torch.int32)
    if not looked_up or not rows.numel() or columns < 1:
        return reference.OPS["dequantize_rows"](*args)
    if rows.device != codes.device:
        raise ShapeError(f"rows on {rows.device} cannot be looked up in a weight on {codes.device}")
    weight = packed_weight(args, 0)
    held = min(codes.numel() * 8 // weight.bits, _scales_held(args) * weight.block_size)
    out = torch.empty((*rows.shape, columns), dtype=dtype, device=codes.device)
    _rows_kernel[(rows.numel(), triton.cdiv(columns, _ROW_TILE))](
        *weight.pointers,
        rows.contiguous(),
        out,
        columns,
        max(held - start, 0) // columns,
        start,
        weight.scale_start,
        BITS=weight.bits,
        SCALE_BITS=weight.scale_bits,
        BLOCK=weight.block_size,
        TILE=_ROW_TILE,
        enable_fp_fusion=False,
    )
    return out


def _scales_held(args: tuple[Any, ...]) -> int:
    """How many scales there are, from the first block of the weight on."""
    scales, absmax, scale_bits, scale_start = args[1], args[2], args[6], args[8]
    if scale_bits == 0:
        return int(scales.numel())
    return min(scales.numel() * 8 // scale_bits, absmax.numel() * 256) - scale_start
