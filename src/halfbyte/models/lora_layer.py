"""LoraLinear4bit: peft's LoRA layer over a frozen 4-bit weight.

Imported when peft is (`peft_dispatch.py`), never before: this module needs peft at its top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from halfbyte.errors import RequestError
from halfbyte.nn import Linear4bit, LoraWeights, lora_linear
from halfbyte.tensor import QuantizedTensor, quantize

# peft's initialisations that change the base weight.
_REWRITING = ("pissa_init", "olora_init", "corda_init", "lora_ga_init")


class LoraLinear4bit(LoraLinear):
    """peft's LoRA layer over a frozen 4-bit weight.

    One plain adapter, the case of training, runs as one operation (`halfbyte.nn.lora`). Everything else (several
    active adapters, mixed batches, DoRA and other variants, a bias in the adapter, hooks on the base layer) runs in
    peft's own forward, with the same result; `slower_because` says why. `merge` puts a dense weight
    into the base layer (decoded in float32, delta added in float32, rounded once to the logical dtype); `unmerge`
    puts the packed one back, exactly.
    """

    slower_because = ""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] -> [..., out]: the base layer's output and the active adapters'."""
        if self._is_slower(args, kwargs):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        dtype = self._product_dtype(x)
        y = lora_linear(x if dtype is None else x.to(dtype), *self._weights(), self._dropout())
        return y if base.compute_dtype is None else y.to(x.dtype)

    def shared(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype, LoraWeights] | None:
        """What this layer computes from an input that others read too, to be computed with them.

        Returns:
            The dtypes of the product and of the result, and the weights; or None where it has to be called by itself:
            it drops elements of the input that are its own, somebody listens to the call, or peft's own forward runs.
        """
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if self._is_slower((), {}) or hooks or "forward" in vars(self) or self._dropout():
            return None
        base: Any = self.base_layer
        dtype = self._product_dtype(x) or x.dtype
        return dtype, dtype if base.compute_dtype is None else x.dtype, self._weights()

    def _is_slower(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether peft's own forward has to run; why is noted, but in a trace: a traced checkpoint changes nothing."""
        why = self._why_not_fused(args, kwargs)
        if not torch.compiler.is_compiling():
            self.slower_because = why
        return bool(why)

    def _weights(self) -> LoraWeights:
        base: Any = self.base_layer
        name = self.active_adapters[0]
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        packed = QuantizedTensor.packed(base.weight)  # torch.compile looks into a function, not into a tensor's method
        return LoraWeights(packed, base.bias, lora_a.weight, lora_b.weight, self.scaling[name])

    def _dropout(self) -> float:
        """The probability that is in force."""
        dropout = self.lora_dropout[self.active_adapters[0]]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def _product_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        """What `x` is cast to before it is multiplied, or None."""
        base: Any = self.base_layer
        dtype: torch.dtype | None = base.compute_dtype
        if dtype is None and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return dtype

    def _why_not_fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why peft's own forward has to run, or "" when the fused one gives the same."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base: Any = self.base_layer
        if self.disable_adapters or self.merged:
            return "adapters are switched off or merged"
        if args or kwargs:
            return "the call has arguments of its own (a mixed batch, a variant)"
        if len(names) != 1 or len(self.active_adapters) != 1:
            return f"{len(names)} adapters are active"
        if names[0] in self.lora_variant or self.lora_bias[names[0]]:
            return "the adapter is a variant or has a bias"
        if not isinstance(base, Linear4bit) or not isinstance(base.weight, QuantizedTensor):
            return "the base layer is no packed one"
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
            return "the base layer has hooks"
        return ""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a dense copy of the base weight.

        Raises:
            ValueError: `safe_merge` is on and the result is not finite; nothing was changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base: Any = self.get_base_layer()
        frozen = base.weight
        dense = nn.Parameter(_dense(frozen, torch.float32), requires_grad=False)
        base.weight = dense
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)
            base.weight = nn.Parameter(base.weight.data.to(frozen.dtype), requires_grad=False)
        except Exception:
            base.weight = frozen
            raise
        if isinstance(frozen, QuantizedTensor):
            self.packed_weight = frozen

    def unmerge(self) -> None:
        """Take all merged adapters out again: the packed weight returns, bit for bit."""
        merged = bool(self.merged_adapters)
        super().unmerge()
        if merged and hasattr(self, "packed_weight"):
            self.get_base_layer().weight = self.packed_weight
            del self.packed_weight

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """Refused: the error that LoftQ starts from is gone from a weight that is quantized already.

        Raises:
            RequestError: always; it names `halfbyte.init_loftq`.
        """
        raise RequestError(
            "LoftQ needs the unquantized weights, and this layer is in 4 bits; make the adapter with the default "
            "initialisation and call halfbyte.init_loftq(model, FOLDER_OF_THE_UNQUANTIZED_MODEL)"
        )


class ParamWrapper(LoraLinear4bit):
    """The same, asked for by its weight's name (`target_parameters`): two names for one thing where it is 2-D.

    Only so do some modules keep their names in peft, see `halfbyte.train.targets`. peft recognises its wrappers of
    parameters by the name of the class, and by `parameter_name` which parameter it is.
    """

    parameter_name = "weight"


def _on_decoded_base(initialise: Callable[..., None]) -> Callable[..., None]:
    """peft's initialisation, run on the decoded base weight; the base becomes what that left, quantized again."""

    @wraps(initialise)
    def on_decoded_base(self: Any, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        frozen = base.weight
        if not isinstance(frozen, QuantizedTensor):
            return initialise(self, *args, **kwargs)
        base.weight = nn.Parameter(frozen.dequantize(), requires_grad=False)
        try:
            initialise(self, *args, **kwargs)
            rest = base.weight.detach()
        finally:
            base.weight = frozen
        if not torch.equal(rest, frozen.dequantize()):
            spec = frozen.spec
            packed = quantize(rest, spec.format, spec.block_size, spec.scale_bits)
            base.weight = nn.Parameter(packed, requires_grad=False)

    return on_decoded_base


def _dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.detach().to(dtype, copy=True)


for _name in _REWRITING:
    if hasattr(LoraLinear, _name):
        setattr(LoraLinear4bit, _name, _on_decoded_base(getattr(LoraLinear, _name)))
