"""Products with a packed weight.

The whole weight is decoded in the activations' dtype and the product is left to torch's GEMM. That is exact in the
sense that matters (the frozen weight is ``value * scale``, rounded once to the compute dtype) and holds one decoded
weight at a time; the packed one is what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.errors import ShapeError
from halfbyte.kernels.reference.dequantize import dequantize
from halfbyte.kernels.schema import split_packed


def linear(*args: Any) -> torch.Tensor:
    """`halfbyte::linear`: packed [out_features, K], x [..., K], bias [out_features] or None -> x.dtype [..., out]."""
    packed, (out_features, x, bias) = split_packed(args)
    if not x.shape[:-1].numel():  # a step of a prompt of which nobody wants logits: a head is not decoded for that
        return x.new_empty((*x.shape[:-1], out_features))
    weight = dequantize(*packed, (out_features, x.shape[-1]), x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def linear_lora(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_lora`: `linear`, and for some rows an adapter's branch beside it.

    After the arguments of `linear` come, for each adapter: A [rank, K], B [out_features, rank], a scaling, and a number
    of rows. The first adapter's rows are the first of `x` (flattened), the second's follow; rows that are left have
    none. A batch that is sorted by adapter is one call.

    Raises:
        ShapeError: the lists or the shapes of an adapter do not fit, or there are more rows of adapters than of `x`.
    """
    packed, (out_features, x, bias, *adapters) = split_packed(args)
    check_adapters(x, out_features, *adapters)
    return add_branches(linear(*packed, out_features, x, bias), x, *adapters)


def check_adapters(
    x: torch.Tensor,
    out_features: int,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
) -> None:
    """Refuse adapters that do not fit each other, the weight or the input."""
    if not len(a) == len(b) == len(scaling) == len(rows):
        raise ShapeError(f"{len(a)} A, {len(b)} B, {len(scaling)} scalings and {len(rows)} counts of rows do not match")
    in_features = x.shape[-1]
    for one_a, one_b in zip(a, b, strict=True):
        rank = one_a.shape[0] if one_a.dim() else 0
        if one_a.shape != (rank, in_features) or one_b.shape != (out_features, rank):
            raise ShapeError(
                f"an adapter of A {tuple(one_a.shape)} and B {tuple(one_b.shape)} "
                f"does not fit a weight ({out_features}, {in_features})"
            )
    have = x.shape[:-1].numel()
    if min(rows, default=0) < 0 or sum(rows) > have:
        raise ShapeError(f"adapters of {list(rows)} rows do not fit an input of {have}")


def add_branches(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
) -> torch.Tensor:
    """`y` [..., out], in place += each adapter's branch on its rows; A and B are cast to `x`'s dtype."""
    have = x.shape[:-1].numel()
    inputs, products = x.reshape(have, x.shape[-1]), y.view(have, y.shape[-1])
    first = 0
    for one_a, one_b, scale, count in zip(a, b, scaling, rows, strict=True):
        branch = inputs[first : first + count] @ one_a.to(x.dtype).t()
        products[first : first + count].addmm_(branch, one_b.to(x.dtype).t(), alpha=scale)
        first += count
    return y


def linear_grad_input(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_grad_input`: packed [N, in_features], grad [..., N] -> grad.dtype [..., in_features]."""
    packed, (in_features, grad) = split_packed(args)
    weight = dequantize(*packed, (grad.shape[-1], in_features), grad.dtype)
    return grad @ weight
