"""transformers' layers of experts on grouped products with packed weights.

transformers gives its mixture-of-experts models one interface: a function that is chosen by the name in
`config._experts_implementation`, with the module's parameters in a known layout. The quantizer registers halfbyte's
under "halfbyte" and chooses it for a model whose experts it packs. A model without the interface runs its own loop, one
slice of the packed tensor at a time; `model.set_experts_implementation("eager")` goes back to that loop for any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from halfbyte.nn import GroupedLora, Routing, combine, dispatch, grouped_linear, grouped_lora, pieces, route

IMPLEMENTATION = "halfbyte"
_PIECE = 1 << 22  # bytes of hidden states that go through the experts together; see experts_forward
BRANCHES = "halfbyte_branches"  # the argument below, which transformers hands through
Branches = Mapping[str, Sequence[GroupedLora]]  # by the parameter's name


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    halfbyte_branches: Branches | None = None,
) -> torch.Tensor:
    """The forward of a module of experts.

    Args:
        self: the module; `use_experts_implementation` of transformers describes it.
        hidden_states: [tokens, hidden].
        top_k_index: integer [tokens, top_k], the experts of each token.
        top_k_weights: [tokens, top_k], their shares in its result.
        halfbyte_branches: adapters of the module's parameters.

    Returns:
        [tokens, hidden], in the dtype of `hidden_states`.
    """
    branches = halfbyte_branches or {}
    routing = route(top_k_index, self.num_experts)
    share = top_k_weights.reshape(-1)[routing.order, None]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not hidden_states.is_cpu:
        outer = _rows(self, hidden_states, share, routing, branches)
    else:
        # What is thrown away at once comes from memory that is mapped already, and stays in a cache: 2048 tokens
        # through OLMoE's layer take 457 ms of CPU time in pieces of 4 MiB, 448 of 1 MiB, 555 without.
        outer = hidden_states.new_empty((len(routing.order), hidden_states.shape[1]))
        for where, part in pieces(routing, _PIECE // (hidden_states.shape[1] * hidden_states.element_size())):
            outer[where] = _rows(self, hidden_states, share[where], part, branches)
    return combine(outer, routing).to(hidden_states.dtype)


def _rows(
    self: Any, hidden_states: torch.Tensor, share: torch.Tensor, routing: Routing, branches: Branches
) -> torch.Tensor:
    """The experts' results, [pairs, hidden], each times its share."""
    norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
    gated = getattr(self, "has_gate", True)
    early = norm is None and not self.has_bias  # the share goes in where the row is narrow: the product is linear

    def between(wide: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """From the one projection to the other, a row for each pair."""
        inner: torch.Tensor = self._apply_gate(wide) if gated else self.act_fn(wide)
        return (inner * share).to(inner.dtype) if early else inner

    x = dispatch(hidden_states, routing)
    name = "gate_up_proj" if gated else "up_proj"
    wide = _project(self, name, x, routing, branches.get(name, ()), hidden_states)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Computed again on the way back: autograd would keep three more tensors of its width, and mapping their pages
        # takes as long.
        inner = checkpoint(between, wide, share, use_reentrant=False, preserve_rng_state=False)
    else:
        inner = between(wide, share)
    outer = _project(self, "down_proj", inner, routing, branches.get("down_proj", ()))
    if early:
        return outer
    return ((outer if norm is None else norm(outer)) * share).to(outer.dtype)


def _project(
    self: Any,
    name: str,
    x: torch.Tensor,
    routing: Routing,
    branches: Sequence[GroupedLora],
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    y = grouped_linear(x, getattr(self, name), routing, transposed=self.is_transposed)
    for adapter in branches:
        y = y + grouped_lora(x.to(y.dtype), adapter, routing, tokens)
    if self.has_bias:
        bias = getattr(self, f"{name}_bias")
        y = y + bias[routing.expert.clamp(max=len(bias) - 1)].to(y.dtype)
    return y


def choose_implementation(model: Any) -> None:
    """Let a transformers model whose experts are packed run on grouped products, where it has the interface."""
    if hasattr(model, "set_experts_implementation"):
        register()
        model.set_experts_implementation(IMPLEMENTATION)


def register() -> None:
    """Offer the implementation to transformers under its name. Safe to call again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
