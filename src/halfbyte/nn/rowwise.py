"""Norm, gate and rotation of a transformer layer as single operations: computed in float32, rounded once.

Written with torch's operations each of them is a chain: a norm of bfloat16 hidden states makes four float32 tensors of
their size and keeps two for the backward pass. Here each is one pass over its inputs, forward and backward, and
autograd keeps the inputs themselves, which their producers hold anyway (and the norm one number a row).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), differentiable in x.

    Args:
        x: [..., n], floating.
        weight: [n], frozen.
        eps: added to the mean.

    Returns:
        [..., n], `x`'s dtype.

    Source: Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    result: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, differentiable in both.

    Args:
        gate: [...], floating.
        up: the same shape and dtype.

    Returns:
        The same shape and dtype. silu(gate) is computed again for the backward pass and not kept.

    Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    result: torch.Tensor = _SwiGLU.apply(gate, up)
    return result


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, differentiable in x.

    Args:
        x: [batch, tokens, heads, dim], floating.
        cos: cosines of the angles, [batch or 1, tokens, dim], `x`'s dtype.
        sin: sines, likewise.

    Returns:
        x cos + (-x2, x1) sin, where x1 and x2 are the halves of a head; shape and dtype of x.

    Source: RoFormer, arXiv 2104.09864, in the arrangement of GPT-NeoX.
    """
    result: torch.Tensor = _Rotary.apply(x, cos, sin)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = torch.ops.halfbyte.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        result: torch.Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.ops.halfbyte.rms_norm_grad(grad, *ctx.saved_tensors), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        result: torch.Tensor = torch.ops.halfbyte.swiglu(gate, up)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.halfbyte.swiglu_grad(grad, *ctx.saved_tensors)
        return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        result: torch.Tensor = torch.ops.halfbyte.rotary(x, cos, sin, False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.ops.halfbyte.rotary(grad, *ctx.saved_tensors, True), None, None
