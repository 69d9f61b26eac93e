"""Layers over quantized weights, and the choice of which parameters get quantized."""

from halfbyte.nn.cross_entropy import linear_cross_entropy
from halfbyte.nn.experts import GroupedLora, Routing, combine, dispatch, grouped_linear, grouped_lora, pieces, route
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraWeights, lora_linear, lora_linears
from halfbyte.nn.replace import Plan, QuantizationReport, make_plan, output_layers, prepare, quantize_model, report
from halfbyte.nn.rowwise import rms_norm, rotary, swiglu

__all__ = [
    "GroupedLora",
    "Linear4bit",
    "LoraWeights",
    "Plan",
    "QuantizationReport",
    "Routing",
    "combine",
    "dispatch",
    "grouped_linear",
    "grouped_lora",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "make_plan",
    "output_layers",
    "pieces",
    "prepare",
    "quantize_model",
    "report",
    "rms_norm",
    "rotary",
    "route",
    "swiglu",
]
