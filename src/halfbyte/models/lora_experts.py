"""peft's LoRA on a packed 3-D parameter of experts (`target_parameters`).

peft adds the change of every expert to the parameter itself: that decodes all experts at each call, and autograd keeps
the sum, an unquantized copy of the layer, until the backward pass. Here the packed parameter stays as it is, and the
rows of each expert go through its A and B beside the grouped product.

Imported when peft is (`peft_dispatch.py`), never before: this module needs peft at its top.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from halfbyte.models.experts import BRANCHES, IMPLEMENTATION
from halfbyte.nn import GroupedLora
from halfbyte.tensor import QuantizedTensor


class ParamWrapper(lora.ParamWrapper):
    """peft's LoRA layer over one packed parameter [experts, out, in] (or [experts, in, out]) of a module of experts.

    It has the name of peft's, because peft recognises its wrappers by that name.

    Where the module runs on grouped products, so do its adapters. Where it does not, or the parameter was merged,
    peft's own forward runs, with the same result, and `slower_because` says why. `merge` puts a dense parameter in the
    packed one's place (decoded and added in float32, rounded once to the logical dtype); `unmerge` puts the packed one
    back.
    """

    slower_because = ""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's forward, with the active adapters' change of the parameter."""
        why = self._why_not_grouped(kwargs)
        if not torch.compiler.is_compiling():  # a traced checkpoint changes nothing
            self.slower_because = why
        result: torch.Tensor
        if why:
            result = super().forward(x, *args, **kwargs)
            return result
        self._check_forward_args(x, *args, **kwargs)
        # Wrappers of the module's other parameters lie around this one or inside: each adds its own on the way.
        branches = {**kwargs.pop(BRANCHES, {}), self.parameter_name: self._adapters()}
        result = self.base_layer(x, *args, **kwargs, **{BRANCHES: branches})
        return result

    def _why_not_grouped(self, kwargs: dict[str, Any]) -> str:
        """Why peft's own forward has to run, or "" when grouped products give the same."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return "adapters are switched off or merged"
        if kwargs.get("adapter_names"):
            return "the call is a mixed batch"
        if not isinstance(self.get_param(), QuantizedTensor):
            return "the parameter is no packed one"
        if getattr(getattr(base, "config", None), "_experts_implementation", None) != IMPLEMENTATION:
            return "the experts run transformers' loop"
        return ""

    def _adapters(self) -> list[GroupedLora]:
        found = []
        lora_a: Any = self.lora_A
        lora_b: Any = self.lora_B
        for name in self.active_adapters:
            if name in lora_a:
                a, b = lora_a[name].weight, lora_b[name].weight
                # peft keeps the experts' matrices in one: A by expert, then rank; B by rank, then expert.
                by_expert = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
                found.append(GroupedLora(a.view(self.num_experts, -1, a.shape[1]), by_expert, self.scaling[name]))
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a dense copy of the parameter.

        Raises:
            ValueError: `safe_merge` is on and the result is not finite; nothing was changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        frozen = self.get_param()
        if not names or not isinstance(frozen, QuantizedTensor):
            super().merge(safe_merge=safe_merge, adapter_names=names)
            return
        base = self.get_base_layer()
        setattr(base, self.parameter_name, nn.Parameter(frozen.dequantize(torch.float32), requires_grad=False))
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)
            dense = nn.Parameter(self.get_param().data.to(frozen.dtype), requires_grad=False)
        except Exception:
            setattr(base, self.parameter_name, frozen)
            raise
        setattr(base, self.parameter_name, dense)
        self.packed_parameter = frozen

    def unmerge(self) -> None:
        """Take all merged adapters out again: the packed parameter returns, bit for bit."""
        merged = bool(self.merged_adapters)
        super().unmerge()
        if merged and hasattr(self, "packed_parameter"):
            setattr(self.get_base_layer(), self.parameter_name, self.packed_parameter)
            del self.packed_parameter
