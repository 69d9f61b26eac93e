"""LoRA on 4-bit layers through plain peft: `get_peft_model(model, LoraConfig(...))`.

peft turns a layer into an adapted one by asking a list of dispatchers in turn; the last one knows `nn.Linear`, and so
would handle `Linear4bit` too. It would get one thing wrong: merging. peft's own layer adds the delta to `weight.data`
in place, which packed storage refuses. The dispatcher here is asked just before and makes `LoraLinear4bit`, which
merges into a dense weight: adding a small delta and quantizing the sum again can erase it (mlx-lm#1564). Packed
parameters of experts (`target_parameters`) get a wrapper of halfbyte's likewise (`lora_experts.py`).

Variants without a layer of their own (DoRA, rsLoRA, ...) run in peft's own code, which sees the decoded weight.
Initialisations that take the adapter's start out of the base weight (PiSSA, OLoRA, ...) run on a decoded copy,
and what they leave there is quantized again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import nn

from halfbyte.nn import Linear4bit
from halfbyte.tensor import QuantizedTensor

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
    from halfbyte.models import lora_experts, lora_layer

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, lora_model.BaseTunerLayer) else target
        parameter = getattr(base, kwargs.get("parameter_name") or "", None)
        if isinstance(parameter, QuantizedTensor) and parameter.dim() == 3:
            experts: nn.Module = lora_experts.ParamWrapper(target, adapter_name, config=config, **kwargs)
            return experts
        if isinstance(base, Linear4bit) and kwargs.get("parameter_name") in (None, "weight"):
            config.fan_in_fan_out = False
            by_module = kwargs.get("parameter_name") is None
            kind = lora_layer.LoraLinear4bit if by_module else lora_layer.ParamWrapper
            layer: nn.Module = kind(target, adapter_name, config=config, **kwargs)
            return layer
        adapted: nn.Module | None = next_dispatcher(target, adapter_name, config=config, **kwargs)
        return adapted

    dispatch.asks_halfbyte = True  # type: ignore[attr-defined]
    # peft offers no registration for a layer type; its list of dispatchers is built from this module's names.
    lora_model.dispatch_default = dispatch
