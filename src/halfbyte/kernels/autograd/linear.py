"""Gradients of `linear` and of `linear_grad_input`.

They go only towards its input and its bias: the packed weight is frozen. What autograd keeps between
forward and backward is the packed weight, which the model holds anyway, and nothing decoded: keeping a decoded weight
for every layer would undo the whole saving (torchtune#693).
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.kernels.schema import LIBRARY, NAMESPACE, PackedWeight, split_packed


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    packed, (_, x, bias) = split_packed(inputs)
    ctx.save_for_backward(packed.codes, packed.scales, packed.scale_absmax, packed.scale_offset)
    ctx.description = packed[4:]
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    packed = PackedWeight(*ctx.saved_tensors, *ctx.description)
    grad_x = grad_bias = None
    x_at = len(packed) + 1
    if ctx.needs_input_grad[x_at]:
        grad_x = torch.ops.halfbyte.linear_grad_input(*packed, ctx.in_features, grad)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[x_at + 1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return (*(None for _ in packed), None, grad_x, grad_bias)


torch.library.register_autograd(f"{NAMESPACE}::linear", _backward, setup_context=_save, lib=LIBRARY)


def _double_save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    packed, (_, grad) = split_packed(inputs)
    ctx.save_for_backward(packed.codes, packed.scales, packed.scale_absmax, packed.scale_offset)
    ctx.description = packed[4:]
    ctx.out_features = grad.shape[-1]


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    packed = PackedWeight(*ctx.saved_tensors, *ctx.description)
    # g W is linear in g, so its own gradient is the forward product without a bias.
    return (*(None for _ in packed), None, torch.ops.halfbyte.linear(*packed, ctx.out_features, grad, None))


torch.library.register_autograd(
    f"{NAMESPACE}::linear_grad_input", _double_backward, setup_context=_double_save, lib=LIBRARY
)
