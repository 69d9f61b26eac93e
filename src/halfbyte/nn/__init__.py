"""Layers over quantized weights, and the choice of which parameters get quantized."""

from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import lora_linear
from halfbyte.nn.replace import Plan, QuantizationReport, make_plan, output_layers, prepare, quantize_model, report

__all__ = [
    "Linear4bit",
    "Plan",
    "QuantizationReport",
    "lora_linear",
    "make_plan",
    "output_layers",
    "prepare",
    "quantize_model",
    "report",
]
