"""Encode weights, and their scales a second time."""

from __future__ import annotations

import torch

from halfbyte.formats import blockwise, double_quant, get_codebook


def quantize(w: torch.Tensor, format: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`halfbyte::quantize`; see `formats.blockwise.quantize`."""
    return blockwise.quantize(w, get_codebook(format), block_size)


def quantize_scales(scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`halfbyte::quantize_scales`; see `formats.double_quant.quantize_scales`."""
    return double_quant.quantize_scales(scales, bits)
