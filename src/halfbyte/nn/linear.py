"""Linear4bit: a frozen 4-bit linear layer.

A plain `nn.Linear` with a `QuantizedTensor` for a weight already multiplies correctly. This class adds what a plain one
has no place for: a compute dtype of its own, a printed description, and a type that peft's dispatcher recognises.
"""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.formats import QuantSpec
from halfbyte.tensor import QuantizedTensor, quantize


class Linear4bit(nn.Linear):
    """y = x W^T + b with a quantized, frozen W.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: whether there is one; it keeps its dtype and may be trained.
        compute_dtype: dtype of the product; None computes in the input's. The result has the input's dtype either way.
        device: "meta" makes a layer whose weight is loaded later.

    Until a `QuantizedTensor` is assigned to `weight`, the layer is an ordinary linear layer on the meta device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        self.compute_dtype = compute_dtype

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        spec: QuantSpec | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """A layer made from a dense weight [out_features, in_features] and bias [out_features].

        Raises:
            FormatError: the weight holds NaN or Inf, or is not floating.
        """
        spec = spec or QuantSpec()
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, compute_dtype=compute_dtype, dtype=weight.dtype)
        packed = (
            weight
            if isinstance(weight, QuantizedTensor)
            else quantize(weight.detach(), spec.format, spec.block_size, spec.scale_bits)
        )
        layer.weight = nn.Parameter(packed, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] -> [..., out_features], in `x`'s dtype."""
        if self.compute_dtype is None or x.dtype == self.compute_dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nn.functional.linear(x.to(self.compute_dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        described = super().extra_repr()
        if isinstance(self.weight, QuantizedTensor):
            described += f", {self.weight.spec.format}, block_size={self.weight.spec.block_size}"
        return described
