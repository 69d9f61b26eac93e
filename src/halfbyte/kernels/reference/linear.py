"""Products with a packed weight.

The whole weight is decoded in the activations' dtype and the product is left to torch's GEMM. That is exact in the
sense that matters (the frozen weight is ``value * scale``, rounded once to the compute dtype) and holds one decoded
weight at a time; the packed one is what autograd keeps.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.kernels.reference.dequantize import dequantize
from halfbyte.kernels.schema import split_packed


def linear(*args: Any) -> torch.Tensor:
    """`halfbyte::linear`: packed [out_features, K], x [..., K], bias [out_features] or None -> x.dtype [..., out]."""
    packed, (out_features, x, bias) = split_packed(args)
    weight = dequantize(*packed, (out_features, x.shape[-1]), x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def linear_grad_input(*args: Any) -> torch.Tensor:
    """`halfbyte::linear_grad_input`: packed [N, in_features], grad [..., N] -> grad.dtype [..., in_features]."""
    packed, (in_features, grad) = split_packed(args)
    weight = dequantize(*packed, (grad.shape[-1], in_features), grad.dtype)
    return grad @ weight
