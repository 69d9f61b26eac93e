"""The numbers of an AdamW step, computed on the device where it runs, so that a CUDA graph may hold the step.

A replayed graph runs no Python: what changes from step to step has to follow from tensors. The step numbers are such
tensors; here the rest follows from them, as `kernels.slots` computes it from numbers of the host otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.kernels.slots import device_options


def norm_of(squares: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradients' norm, float64 [], on the first device; not finite where one of them is not.

    Args:
        squares: `DeviceBatch.squares` of each device.
    """
    device = squares[0].device
    return torch.cat([some.to(device) for some in squares]).sum().sqrt()


def advance(steps: list[torch.Tensor], norm: torch.Tensor | None, max_norm: float | None) -> torch.Tensor:
    """Count a step, unless a gradient is not finite.

    Args:
        steps: float64 [] of each parameter that is stepped, on one device; changed in place.
        norm: from `norm_of`; None: nobody looked.
        max_norm: what the norm is scaled down to, or None.

    Returns:
        What gradients are multiplied by, float64 [], on that device; NaN where there is no step.
    """
    one = torch.ones((), dtype=torch.float64, device=steps[0].device)
    if norm is None:
        torch._foreach_add_(steps, 1.0)
        return one
    norm = norm.to(one.device)
    finite = norm.isfinite()
    torch._foreach_add_(steps, finite.double())
    scale = one if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return scale.where(finite, math.nan)


def options_of(
    groups: Sequence[Mapping[str, Any]], params: Sequence[torch.Tensor], steps: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """What `DeviceBatch.step_on_device` is told of parameters.

    Args:
        groups: of the optimizer.
        params: some of theirs, in their order.
        steps: float64 [parameters].
        scale: from `advance`.

    Returns:
        float32 [parameters, 10], and what each parameter's first moment gives to the gradient.
    """
    stepped = set(params)
    rows: list[torch.Tensor] = []
    weights1: list[float] = []
    for group in groups:
        first, count = len(weights1), sum(param in stepped for param in group["params"])
        if count:
            rows.append(device_options(group, steps[first : first + count], scale))
            weights1 += [1 - group["betas"][0]] * count
    return torch.cat(rows), weights1
