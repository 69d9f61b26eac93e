"""Products of rows that are sorted by expert, each with its expert's slice of one packed weight.

A mixture-of-experts layer sends each token to a few of its experts. Its rows, sorted by expert, are multiplied in
groups: rows [ends[e - 1], ends[e]) with expert e. Only the experts that have rows are decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels.reference.linear import linear, linear_grad_input
from halfbyte.kernels.schema import group_bounds, split_packed


def grouped_linear(*args: Any) -> torch.Tensor:
    """`halfbyte::grouped_linear`: packed [experts, out_features, K], x [rows, K], ends int32 [experts] -> [rows, out].

    Rows from the last end on belong to no expert, and their results are 0.

    Raises:
        ShapeError: x is no matrix, or the ends are not ascending row numbers.
    """
    packed, (n, x, ends) = split_packed(args)

    def multiply(part: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear(*weight, n, part, None)

    return _by_expert(packed, n * x.shape[-1], n, x, ends, multiply)


def grouped_linear_grad_input(*args: Any) -> torch.Tensor:
    """`halfbyte::grouped_linear_grad_input`: packed [experts, N, K], grad [rows, N], ends -> [rows, K].

    It is also the product with experts that are stored transposed, [experts, in, out].

    Raises:
        ShapeError: as for `grouped_linear`.
    """
    packed, (k, grad, ends) = split_packed(args)

    def multiply(part: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear_grad_input(*weight, k, part)

    return _by_expert(packed, grad.shape[-1] * k, k, grad, ends, multiply)


def _by_expert(
    packed: Any,
    size: int,
    features: int,
    x: torch.Tensor,
    ends: torch.Tensor,
    multiply: Callable[[torch.Tensor, Any], torch.Tensor],
) -> torch.Tensor:
    bounds = group_bounds(x, ends)
    out = x.new_zeros((x.shape[0], features))
    for expert, (first, last) in enumerate(bounds):
        if first < last:
            out[first:last] = multiply(x[first:last], packed.span(expert * size, size))
    return out
