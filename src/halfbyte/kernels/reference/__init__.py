"""The ops written with torch, for any device: what every native version must equal. One file per stem."""

from collections.abc import Callable
from typing import Any

from halfbyte.kernels.reference.dequantize import dequantize, dequantize_rows
from halfbyte.kernels.reference.grouped import grouped_linear, grouped_linear_grad_input
from halfbyte.kernels.reference.linear import linear, linear_grad_input, linear_lora
from halfbyte.kernels.reference.quantize import quantize, quantize_scales
from halfbyte.kernels.reference.rowwise import cross_entropy_, rms_norm, rms_norm_grad, rotary, swiglu, swiglu_grad

OPS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "quantize_scales": quantize_scales,
    "dequantize": dequantize,
    "dequantize_rows": dequantize_rows,
    "linear": linear,
    "linear_lora": linear_lora,
    "linear_grad_input": linear_grad_input,
    "grouped_linear": grouped_linear,
    "grouped_linear_grad_input": grouped_linear_grad_input,
    "cross_entropy_": cross_entropy_,
    "rms_norm": rms_norm,
    "rms_norm_grad": rms_norm_grad,
    "swiglu": swiglu,
    "swiglu_grad": swiglu_grad,
    "rotary": rotary,
}
