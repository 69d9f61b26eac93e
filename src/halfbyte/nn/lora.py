"""A frozen 4-bit weight and its LoRA branch as one operation: y = W x + b + s B A drop(x).

Written as separate operations (peft's way), each linear layer makes four tensors of the output's size: the product with
W, the branch, the scaled branch and their sum. Here the branch is added into the product in place, forward and
backward, and autograd keeps only what the gradients need: the packed weight, which the model holds anyway, the input
(one tensor, shared by all layers that read it) and A x, which has `rank` columns. With dropout the dropped input takes
the input's place, and one byte an element says what was dropped.

Layers that read one input (q, k and v; gate and up) are one operation too: their A are stacked, so that x A^T, the
gradient of A and the branches' gradient of x are one product each, where every layer alone would read x again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from halfbyte.kernels import PackedWeight


class LoraWeights(NamedTuple):
    """A frozen weight and its adapter.

    Attributes:
        weight: packed [out, in], frozen.
        bias: [out] or None, any floating dtype.
        a: [rank, in], any floating dtype (float32 masters).
        b: [out, rank], likewise.
        scaling: lora_alpha / rank, usually.
    """

    weight: PackedWeight
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


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

    Where no gradient is asked for, it is one call of `halfbyte::linear_lora`.

    Args:
        x: [..., in], the dtype of the computation.
        weight: packed [out, in], frozen.
        bias: [out] or None, any floating dtype.
        a: [rank, in], any floating dtype (float32 masters); cast to `x`'s for products of many rows or with gradients.
        b: [out, rank], likewise.
        scaling: lora_alpha / rank, usually.
        dropout: probability that an element of the branch's input is dropped; 0 outside training.

    Returns:
        [..., out], `x`'s dtype.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    inputs = (x, bias, a, b)
    dropped = None
    if dropout > 0:
        # native_dropout keeps a mask of one byte an element; nn.functional.dropout keeps one of the input's dtype on a
        # CPU.
        dropped = torch.native_dropout(x, dropout, True)[0]
    elif not torch.is_grad_enabled() or not any(one is not None and one.requires_grad for one in inputs):
        rows = [x.shape[:-1].numel()]
        cast_bias = None if bias is None else bias.to(x.dtype)
        y: torch.Tensor = torch.ops.halfbyte.linear_lora(*weight, b.shape[0], x, cast_bias, [a], [b], [scaling], rows)
        return y
    result: torch.Tensor = _LoraLinears.apply(x, dropped, (scaling,), (weight,), bias, a, b)[0]
    return result


def lora_linears(x: torch.Tensor, layers: Sequence[LoraWeights]) -> tuple[torch.Tensor, ...]:
    """`lora_linear` of one input by several layers, without dropout (where each layer draws a mask of its own).

    Args:
        x: [..., in], the dtype of the computation.
        layers: one or more; ranks, scalings and dtypes may differ.

    Returns:
        For each layer [..., out], `x`'s dtype.
    """
    tensors = [tensor for layer in layers for tensor in (layer.bias, layer.a, layer.b)]
    scalings, weights = tuple(layer.scaling for layer in layers), tuple(layer.weight for layer in layers)
    results: tuple[torch.Tensor, ...] = _LoraLinears.apply(x, None, scalings, weights, *tensors)
    return results


_PER_LAYER = 3  # bias, A, B
_INNER = 4  # tensors of a packed weight


class _LoraLinears(torch.autograd.Function):
    """`x` goes through each W, and `dropped` through each branch; None: `x` does, which is not given twice.

    torch.compile does not trace a function that is given one tensor twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        scalings: tuple[float, ...],
        weights: tuple[PackedWeight, ...],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        cast: list[Any] = [None if tensor is None else tensor.to(x.dtype) for tensor in tensors]  # A and B are there
        biases, every_a, every_b = (cast[at::_PER_LAYER] for at in range(_PER_LAYER))
        a = every_a[0] if len(every_a) == 1 else torch.cat(every_a)
        inputs = x if dropped is None else dropped
        branches = inputs.reshape(-1, x.shape[-1]) @ a.t()
        results = []
        for weight, bias, b, branch, scaling in zip(
            weights, biases, every_b, branches.split([len(one) for one in every_a], 1), scalings, strict=True
        ):
            y = torch.ops.halfbyte.linear(*weight, b.shape[0], x, bias)
            y.view(-1, b.shape[0]).addmm_(branch, b.t(), alpha=scaling)
            results.append(y)
        fields = [tuple(weight) for weight in weights]  # torch 2.6 does not trace a slice of a named tuple
        ctx.save_for_backward(inputs, branches, a, *every_b, *(one for weight in fields for one in weight[:_INNER]))
        ctx.descriptions, ctx.scalings = [weight[_INNER:] for weight in fields], scalings
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in tensors[::_PER_LAYER]]
        ctx.same = dropped is None
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.scalings)
        inputs, branches, a, *rest = ctx.saved_tensors
        every_b, inner = rest[:count], rest[count:]
        ranks, in_features = [b.shape[1] for b in every_b], a.shape[1]
        need_x, need_dropped, _, _, *need = ctx.needs_input_grad
        of_tensors: list[torch.Tensor | None] = [None] * (count * _PER_LAYER)
        # scaling * g B, side by side: what the branches' gradients of A and of x are made of.
        grad_branches = torch.empty_like(branches)
        grad_x = grad_dropped = None
        for i, (grad, part, branch) in enumerate(
            zip(grads, grad_branches.split(ranks, 1), branches.split(ranks, 1), strict=True)
        ):
            if grad is None:
                part.zero_()
                continue
            rows, b, at = grad.reshape(-1, every_b[i].shape[0]), every_b[i], i * _PER_LAYER
            part.addmm_(rows, b, beta=0, alpha=ctx.scalings[i])
            if need[at]:
                total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
                of_tensors[at] = total.to(ctx.bias_dtypes[i])
            if need[at + 2]:
                of_tensors[at + 2] = (rows.t() @ branch).mul_(ctx.scalings[i])
            if need_x:
                weight = PackedWeight(*inner[i * _INNER : (i + 1) * _INNER], *ctx.descriptions[i])
                through = torch.ops.halfbyte.linear_grad_input(*weight, in_features, grad)
                grad_x = through if grad_x is None else grad_x.add_(through)
        if any(need[1::_PER_LAYER]):
            grad_a = grad_branches.t() @ inputs.reshape(-1, in_features)
            for i, one in enumerate(grad_a.split(ranks)):
                of_tensors[i * _PER_LAYER + 1] = one if need[i * _PER_LAYER + 1] else None
        if grad_x is not None and ctx.same:
            grad_x.view(-1, in_features).addmm_(grad_branches, a)
        if need_dropped and not ctx.same:
            grad_dropped = (grad_branches @ a).view(inputs.shape)
        return grad_x, grad_dropped, None, None, *of_tensors
