"""The ops on Triton's kernels, by name: each runs on the device of its first tensor and on that device's stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch

from halfbyte.kernels.triton.dequantize import dequantize, dequantize_rows
from halfbyte.kernels.triton.grouped import grouped_linear, grouped_linear_grad_input
from halfbyte.kernels.triton.linear import linear, linear_grad_input, linear_lora
from halfbyte.kernels.triton.quantize import quantize


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever device the pointers belong to."""

    @wraps(op)
    def on_its_device(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return op(*args)

    return on_its_device


OPS: Mapping[str, Callable[..., Any]] = {
    op.__name__: _on_its_device(op)
    for op in (
        quantize,
        dequantize,
        dequantize_rows,
        linear,
        linear_lora,
        linear_grad_input,
        grouped_linear,
        grouped_linear_grad_input,
    )
}
