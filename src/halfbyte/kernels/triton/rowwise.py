"""What a decoder step computes between its products, row by row, on a GPU.

Numbers are rounded where the reference rounds them: everything is computed in float32 and stored in the activations'
dtype. A training step runs these operations elsewhere (`nn/parts.py`): here there is no way back.

Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATED = 1024  # numbers that a program of the gate takes


@triton.jit
def _norm_kernel(x, added, weight, y, size, eps, ADDED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, SIZE)
    column = tl.arange(0, SIZE)
    inside = column < size
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADDED:
        values = (values.to(tl.float32) + tl.load(added + at, mask=inside, other=0.0).to(tl.float32)).to(values.dtype)
        tl.store(x + at, values, mask=inside)
    wide = values.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (scale * (wide * rstd)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_kernel(gate, up, y, count, GELU: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    at_sigmoid = x
    if GELU:
        at_sigmoid = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
    factor = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (x * tl.sigmoid(at_sigmoid) * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _mix_kernel(middle, shares, columns, y, rows, total, adapters, SIZE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < total
    owner = tl.load(columns + column, mask=inside, other=0)
    first = tl.load(columns + total + column, mask=inside, other=0)
    width = tl.load(columns + 2 * total + column, mask=inside, other=0)
    to = first * rows + row * width + column - first
    share = tl.load(shares + row * adapters + owner, mask=inside, other=0.0)
    value = tl.load(middle + row * total + column, mask=inside, other=0.0).to(tl.float32) * share
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, n], weight [n] -> weight * x / rms(x), as x; where `added` is given, x += added comes first, in place.

    Source: Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    y = torch.empty_like(x)
    size = x.shape[1]
    padded = triton.next_power_of_2(size)
    _norm_kernel[(x.shape[0],)](
        x,
        x if added is None else added,
        weight,
        y,
        size,
        eps,
        ADDED=added is not None,
        SIZE=padded,
        num_warps=min(max(padded // 512, 1), 16),
        enable_fp_fusion=False,
    )
    return y


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation` ("silu" or "gelu_tanh") of gate, times up, rounded once; all of one shape, contiguous."""
    y = torch.empty_like(gate)
    count = gate.numel()
    grid = (triton.cdiv(count, _GATED),)
    _gated_kernel[grid](gate, up, y, count, GELU=activation == "gelu_tanh", SIZE=_GATED, enable_fp_fusion=False)
    return y


def mix(middle: torch.Tensor, shares: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What rows take of adapters, member after member of a group of matrices.

    Args:
        middle: [rows, total]: x A^T for the A of all members and adapters, member by member.
        shares: float32 [rows, adapters].
        columns: int32 [3, total]: the adapter whose column it is, its member's first column, its member's columns.

    Returns:
        [rows * total], in which a member's part begins at rows * (its first column) and is [rows, its columns].
    """
    rows, total = middle.shape
    y = middle.new_empty(rows * total)
    _mix_kernel[(rows, triton.cdiv(total, 128))](middle, shares, columns, y, rows, total, shares.shape[1], SIZE=128)
    return y
