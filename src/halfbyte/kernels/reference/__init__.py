"""The ops written with torch, for any device: what every native version must equal. One file per stem."""

from collections.abc import Callable
from typing import Any

from halfbyte.kernels.reference.dequantize import dequantize, dequantize_rows
from halfbyte.kernels.reference.linear import linear, linear_grad_input
from halfbyte.kernels.reference.quantize import quantize, quantize_scales

OPS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "quantize_scales": quantize_scales,
    "dequantize": dequantize,
    "dequantize_rows": dequantize_rows,
    "linear": linear,
    "linear_grad_input": linear_grad_input,
}
