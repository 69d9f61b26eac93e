"""LoRA on 4-bit layers through plain peft: `get_peft_model(model, LoraConfig(...))`.

peft turns a layer into an adapted one by asking a list of dispatchers in turn; the last one knows `nn.Linear`, and so
would handle `Linear4bit` too. It would get one thing wrong: merging. peft's own layer adds the delta to `weight.data`
in place, which packed storage refuses. The dispatcher here is asked just before and makes `LoraLinear4bit`, which
merges into a dense weight: adding a small delta and quantizing the sum again can erase it (mlx-lm#1564).

Variants without a layer of their own (DoRA, rsLoRA, ...) run in peft's own code, which sees the decoded weight.
Initialisations that take the adapter's start out of the base weight (PiSSA, OLoRA, LoftQ, ...) run on a decoded copy,
and what they leave there is quantized again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn

from halfbyte.nn import Linear4bit
from halfbyte.tensor import QuantizedTensor, quantize

# peft's initialisations that change the base weight.
_REWRITING = ("pissa_init", "olora_init", "corda_init", "loftq_init", "lora_ga_init")


_PEFT_MODULE = "peft.tuners.lora.model"


def register_dispatcher() -> None:
    """Let peft's LoRA know `Linear4bit`, now or as soon as peft is imported. Safe to call again."""
    if _PEFT_MODULE in sys.modules:
        _add_dispatcher(sys.modules[_PEFT_MODULE])
    elif not any(isinstance(finder, _PeftImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftImport())


class _PeftImport(importlib.abc.MetaPathFinder):
    """Waits for peft's LoRA module, lets the ordinary finders find it, and adds the dispatcher once it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of that one module; None for every other."""
        if fullname != _PEFT_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _add_dispatcher(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader serves this module only
        return spec


def _add_dispatcher(lora_model: Any) -> None:
    if getattr(lora_model.dispatch_default, "asks_halfbyte", False):
        return
    next_dispatcher = lora_model.dispatch_default
    layer_class = _make_layer_class()

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = getattr(target, "base_layer", target)
        if isinstance(base, Linear4bit) and kwargs.get("parameter_name") is None:
            config.fan_in_fan_out = False
            layer: nn.Module = layer_class(target, adapter_name, config=config, **kwargs)
            return layer
        adapted: nn.Module | None = next_dispatcher(target, adapter_name, config=config, **kwargs)
        return adapted

    dispatch.asks_halfbyte = True  # type: ignore[attr-defined]
    # peft offers no registration for a layer type; its list of dispatchers is built from this module's names.
    lora_model.dispatch_default = dispatch


def _make_layer_class() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraLinear4bit(LoraLinear):
        """peft's LoRA layer over a frozen 4-bit weight.

        Forward, dropout, bias, several adapters, mixed batches and variants are peft's own. `merge` puts a dense weight
        into the base layer (decoded in float32, delta added in float32, rounded once to the logical dtype); `unmerge`
        puts the packed one back, exactly.
        """

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

    for name in _REWRITING:
        if hasattr(LoraLinear, name):
            setattr(LoraLinear4bit, name, _on_decoded_base(getattr(LoraLinear, name)))
    return LoraLinear4bit


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
