"""Decode a whole packed weight, or some of its rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from halfbyte.formats import SCALE_BLOCK, blockwise, double_quant, get_codebook
from halfbyte.formats.packing import gather
from halfbyte.kernels.schema import PackedWeight, split_packed


def dequantize(*args: Any) -> torch.Tensor:
    """`halfbyte::dequantize`: packed weight, shape, dtype -> `dtype` [*shape]."""
    packed, (shape, dtype) = split_packed(args)
    return _decode(packed, math.prod(shape), dtype).view(shape)


def dequantize_rows(*args: Any) -> torch.Tensor:
    """`halfbyte::dequantize_rows`: packed [N, columns], rows int64 [...], dtype -> `dtype` [..., columns].

    Only the rows asked for are decoded: an embedding's table is never held in full.
    """
    packed, (columns, rows, dtype) = split_packed(args)
    if rows.device.type == "cpu" and rows.numel() and rows.min() < 0:
        # Indexing would count from the end: an ignored label (-100) looked up by mistake would pass for a token.
        raise IndexError(f"row {int(rows.min())} is out of range")
    book = get_codebook(packed.format)
    index = packed.start + rows[..., None] * columns + torch.arange(columns, device=rows.device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = book.table(rows.device).to(work)[gather(packed.codes, book.bits, index)]
    block = index // packed.block_size
    if packed.scale_bits == 0:
        scales = packed.scales[block]
    else:
        assert packed.scale_absmax is not None and packed.scale_offset is not None
        at = packed.scale_start + block
        table = double_quant.scale_table(packed.scale_bits, rows.device)
        scales = table[gather(packed.scales, packed.scale_bits, at)] * packed.scale_absmax[at // SCALE_BLOCK]
        scales = scales + packed.scale_offset
    return (values * scales).to(dtype)


def _decode(packed: PackedWeight, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The flattened tensor's `count` weights: `dtype` [count]."""
    blocks = -(-(packed.start + count) // packed.block_size)
    if packed.scale_bits == 0:
        scales = packed.scales[:blocks]
    else:
        assert packed.scale_absmax is not None and packed.scale_offset is not None
        scales = double_quant.dequantize_scales(
            packed.scales,
            packed.scale_absmax,
            packed.scale_offset,
            packed.scale_bits,
            blocks,
            packed.scale_start,
        )
    book = get_codebook(packed.format)
    return blockwise.dequantize(packed.codes, scales, book, packed.block_size, count, dtype, packed.start)
