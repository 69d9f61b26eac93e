"""Projections that read one tensor: q, k and v of an attention, gate and up of an MLP.

In training with LoRA they are computed together (`halfbyte.nn.lora_linears`): their A are stacked. A layer that has to
be called by itself (its dropout draws a mask of its own, it has no adapter, somebody hooked it) is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from halfbyte.nn import LoraWeights, lora_linears

ATTENTION = ("q_proj", "k_proj", "v_proj")


def project(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """`[layer(x) for layer in layers]`; what can be computed together is."""
    together: dict[int, LoraWeights] = {}
    dtypes = set()
    for at, layer in enumerate(layers):
        ask: Callable[..., Any] | None = getattr(layer, "shared", None)  # LoraLinear4bit's; its module needs peft
        answer = None if ask is None else ask(x)
        if answer is not None:
            dtypes.add(answer[:2])
            together[at] = answer[2]
    if len(together) < 2 or len(dtypes) > 1:
        return [layer(x) for layer in layers]
    product, result = dtypes.pop()
    products = dict(zip(together, lora_linears(x.to(product), list(together.values())), strict=True))
    return [products[at].to(result) if at in products else layer(x) for at, layer in enumerate(layers)]


class SharedInput:
    """An attention module for the length of one call: the first of q, k and v to be called computes all three.

    Everything else is the module's own. What was computed waits for the calls with the very same tensor; any other call
    goes to its layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._input: torch.Tensor | None = None
        self._waiting: dict[str, torch.Tensor] = {}

    @property
    def q_proj(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The projection of queries."""
        return partial(self._call, "q_proj")

    @property
    def k_proj(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The projection of keys."""
        return partial(self._call, "k_proj")

    @property
    def v_proj(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The projection of values."""
        return partial(self._call, "v_proj")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self._input is None:
            self._input = x
            layers = [getattr(self._module, one) for one in ATTENTION]
            self._waiting = dict(zip(ATTENTION, project(x, layers), strict=True))
        if x is self._input and name in self._waiting:
            return self._waiting.pop(name)
        result: torch.Tensor = getattr(self._module, name)(x)
        return result
