"""Gradients of `grouped_linear` and of `grouped_linear_grad_input`: each is the way back of the other.

They go only towards the rows. As in `linear`, autograd keeps the packed weight and nothing decoded; of the rows it
keeps nothing either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels.schema import LIBRARY, NAMESPACE, PackedWeight, split_packed


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    packed, (_, rows, ends) = split_packed(inputs)
    ctx.save_for_backward(packed.codes, packed.scales, packed.scale_absmax, packed.scale_offset, ends)
    ctx.description = packed[4:]
    ctx.features = rows.shape[-1]


def _backward_by(op: str) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *fields, ends = ctx.saved_tensors
        packed = PackedWeight(*fields, *ctx.description)
        of_rows = getattr(torch.ops.halfbyte, op)(*packed, ctx.features, grad, ends)
        return (*(None for _ in packed), None, of_rows, None)

    return backward


for _op, _way_back in (
    ("grouped_linear", "grouped_linear_grad_input"),
    ("grouped_linear_grad_input", "grouped_linear"),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_op}", _backward_by(_way_back), setup_context=_save, lib=LIBRARY)
