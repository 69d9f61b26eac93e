"""A frozen 4-bit weight and its LoRA branch as one operation: y = W x + b + s B A drop(x).

Written as separate operations (peft's way), each linear layer makes four tensors of the output's size: the product with
W, the branch, the scaled branch and their sum. Here the branch is added into the product in place, forward and
backward, and autograd keeps only what the gradients need: the packed weight, which the model holds anyway, the input
(one tensor, shared by all layers that read it) and A x, which has `rank` columns. With dropout the dropped input takes
the input's place, and one byte an element says what was dropped.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.kernels import PackedWeight


def lora_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """y = W x + bias + scaling * B A drop(x), differentiable in x, bias, A and B.

    Args:
        x: [..., in], the dtype of the computation.
        weight: packed [out, in], frozen.
        bias: [out] or None, any floating dtype.
        a: [rank, in], any floating dtype (float32 masters); cast to `x`'s for the products.
        b: [out, rank], likewise.
        scaling: lora_alpha / rank, usually.
        dropout: probability that an element of the branch's input is dropped; 0 outside training.

    Returns:
        [..., out], `x`'s dtype.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    # native_dropout keeps a mask of one byte an element; nn.functional.dropout keeps one of the input's dtype on a CPU.
    dropped = torch.native_dropout(x, dropout, True)[0] if dropout > 0 else x
    result: torch.Tensor = _LoraLinear.apply(x, dropped, bias, a, b, scaling, weight)
    return result


class _LoraLinear(torch.autograd.Function):
    """`x` goes through W and `dropped` through the branch; without dropout they are one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        weight: PackedWeight,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        out_features = b.shape[0]
        cast_bias = None if bias is None else bias.to(x.dtype)
        y: torch.Tensor = torch.ops.halfbyte.linear(*weight, out_features, x, cast_bias)
        branch = dropped.reshape(-1, x.shape[-1]) @ a.t()
        y.view(-1, out_features).addmm_(branch, b.t(), alpha=scaling)
        ctx.save_for_backward(dropped, branch, a, b, *weight[:4])
        ctx.description, ctx.scaling, ctx.same = weight[4:], scaling, dropped is x
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, branch, a, b, *inner = ctx.saved_tensors
        in_features, rows = a.shape[1], grad.reshape(-1, b.shape[0])
        need_x, need_dropped, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        grad_branch = rows @ b
        grad_x = grad_dropped = grad_bias = grad_a = grad_b = None
        if need_a:
            grad_a = (grad_branch.t() @ dropped.reshape(-1, in_features)).mul_(ctx.scaling)
        if need_b:
            grad_b = (rows.t() @ branch).mul_(ctx.scaling)
        if need_bias:
            grad_bias = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(ctx.bias_dtype)
        if need_x:
            weight = PackedWeight(*inner, *ctx.description)
            grad_x = torch.ops.halfbyte.linear_grad_input(*weight, in_features, grad)
            if ctx.same:
                grad_x.view(-1, in_features).addmm_(grad_branch, a, alpha=ctx.scaling)
        if need_dropped and not ctx.same:
            grad_dropped = (grad_branch @ a).mul_(ctx.scaling).view(dropped.shape)
        return grad_x, grad_dropped, grad_bias, grad_a, grad_b, None, None
