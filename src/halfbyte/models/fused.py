"""The one place that gives transformers' modules halfbyte's operations: `fuse(model)`.

| part | instead of | what runs on a CPU | on a GPU, where it is installed |
|---|---|---|---|
| loss | a causal language model's forward with labels, in training mode | `nn.linear_cross_entropy` | liger-kernel's |
| norm | RMSNorm | `nn.rms_norm` | liger-kernel's |
| mlp | silu(gate) * up | `nn.swiglu` | liger-kernel's |
| rotary | the rotation of queries and keys | `nn.rotary` | liger-kernel's |

`halfbyte.nn.parts` decides. The loss makes no logits; without liger-kernel it is halfbyte's on a GPU, too.

Where the mlp or the rotation is covered, adapted projections that read one tensor (gate and up; q, k and v) are one
operation as well (`shared_input.py`).

A module is covered when its class's forward is the very code that the operation stands for (`plain_forwards.py`); the
model classes stay as they are, since only `forward` of this model's instances is replaced. They differ from the class's
own forward by rounding, which they do once where that does it at each step, so they run in training mode only: a model
in eval mode gives transformers' numbers to the bit. Whatever a single call asks for that an operation does not do (a
weight that is trained, another kind of device, mixed dtypes) runs in the class's own forward too.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from halfbyte.models import plain_forwards
from halfbyte.models.shared_input import ATTENTION, SharedInput, project
from halfbyte.nn import linear_cross_entropy
from halfbyte.nn.parts import PARTS, operations

# With the routers' logits among the outputs, and without.
_CAUSAL_LMS = (
    (False, plain_forwards.causal_lm),
    (True, plain_forwards.routed_causal_lm),
    (True, plain_forwards.balanced_causal_lm),
)


def fuse(model: nn.Module) -> dict[str, str]:
    """Replace the forwards of `model`'s modules that are covered, in place.

    Returns:
        For each of `PARTS`: "" where at least one module was replaced, or why none was.
    """
    replaced = dict.fromkeys(PARTS, 0)
    for module in model.modules():
        for part, forward in _replacements(module).items():
            anything: Any = module
            anything.forward = MethodType(forward, module)
            replaced[part] += 1
    reasons = {
        part: "" if count else f"no module of this model has the known {part}" for part, count in replaced.items()
    }
    if not replaced["loss"] and hasattr(model, "get_output_embeddings"):
        reasons["loss"] = f"the forward of {type(model).__name__} does more than project and compare"
    return reasons


def _replacements(module: nn.Module) -> dict[str, Any]:
    """Part -> the forward that takes the place of this module's."""
    if "forward" in vars(module):  # somebody else's, and theirs to keep
        return {}
    plain = inspect.unwrap(type(module).forward)
    if _same(plain, plain_forwards.rms_norm):
        return {"norm": _norm_forward}
    if _same(plain, plain_forwards.gated_mlp) and _is_silu(getattr(module, "act_fn", None)):
        return {"mlp": _mlp_forward}
    for routed, known in _CAUSAL_LMS:
        if _same(plain, known):
            return {"loss": _causal_lm_forward(type(module), routed=routed)}
    names = getattr(plain, "__globals__", {})
    rotates = "apply_rotary_pos_emb" in getattr(plain, "__code__", _norm_forward.__code__).co_names
    if (
        rotates
        and _same(names.get("apply_rotary_pos_emb"), plain_forwards.apply_rotary_pos_emb)
        and _same(names.get("rotate_half"), plain_forwards.rotate_half)
    ):
        return {"rotary": _with_rotary(plain)}
    return {}


def _same(function: Any, plain: Any) -> bool:
    """Whether two functions are the same code, whatever their names, annotations and docstrings."""
    return _essence(function) == _essence(plain)


def _essence(function: Any) -> tuple[Any, ...] | None:
    function = inspect.unwrap(function) if callable(function) else None
    code: CodeType | None = getattr(function, "__code__", None)
    if code is None:
        return None
    constants = code.co_consts[1:] if function.__doc__ is not None else code.co_consts
    return code.co_code, code.co_names, code.co_varnames, tuple(c for c in constants if c is not None)


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    fits = self.training and weight.dtype == hidden_states.dtype and not weight.requires_grad
    chosen = operations(hidden_states) if fits else None
    if chosen is not None:
        return chosen.rms_norm(hidden_states, weight, self.variance_epsilon)
    result: torch.Tensor = type(self).forward(self, hidden_states)
    return result


def _mlp_forward(self: Any, x: torch.Tensor) -> Any:
    gate, up = project(x, (self.gate_proj, self.up_proj)) if self.training else (self.gate_proj(x), self.up_proj(x))
    chosen = operations(gate) if self.training and gate.dtype == up.dtype else None
    if chosen is not None:
        return self.down_proj(chosen.swiglu(gate, up))
    return self.down_proj(self.act_fn(gate) * up)


def _with_rotary(plain: Any) -> Any:
    """An attention's forward that in training finds `_rotate` under the name of transformers' function."""
    own = _rotate(plain.__globals__["apply_rotary_pos_emb"])
    names = {**plain.__globals__, "apply_rotary_pos_emb": own}
    del names["__name__"]  # torch.compile would guard what the named module holds: the plain function
    rotating = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    rotating.__kwdefaults__ = plain.__kwdefaults__

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return plain(self, *args, **kwargs)
        shares = all(name in self._modules for name in ATTENTION)
        return rotating(SharedInput(self) if shares else self, *args, **kwargs)

    return forward


def _rotate(plain: Any) -> Any:
    """`apply_rotary_pos_emb` with the chosen operation, and `plain` where that does not apply."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = unsqueeze_dim == 1 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        chosen = operations(q) if fits and q.dtype == k.dtype == cos.dtype == sin.dtype else None
        rotate = functools.partial(plain, unsqueeze_dim=unsqueeze_dim) if chosen is None else chosen.rotate
        result: tuple[torch.Tensor, torch.Tensor] = rotate(q, k, cos, sin)
        return result

    return apply_rotary_pos_emb


def _is_plain(head: nn.Module) -> bool:
    """Whether `head(x)` is x W^T + b and nothing else: no adapter, no hook, a weight that is whole and not packed."""
    anything: Any = head
    return (
        type(head) is nn.Linear
        and type(anything.weight) is nn.Parameter
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))
    )


def _with_new_rows(head: nn.Module) -> tuple[Any, tuple[list[int], torch.Tensor] | None]:
    """What peft wrapped to train rows of new tokens, and these rows; other heads as they are, and None.

    The wrapper's weight would do, but for a gradient as large as the matrix.
    """
    adapter: Any = getattr(head, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged or len(adapter.active_adapters) != 1:
        return head, None
    name = adapter.active_adapters[0]
    return adapter.base_layer, (adapter.token_indices[name], adapter.trainable_tokens_delta[name])


def _causal_lm_forward(kind: type, *, routed: bool) -> Any:
    """A causal language model's forward that computes the loss in chunks where nobody asks for logits.

    `routed`: its outputs have the routers' logits. A loss of theirs is added in the model's own forward; a loss
    without logits that is asked for by name (`skip_logits=True`) is that of the words alone.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    plain: Any = kind.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    @can_return_tuple
    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        labels: Any = kwargs.get("labels")
        keep = kwargs.get("logits_to_keep", 0)
        skip = labels is not None and (self.training if skip_logits is None else skip_logits)
        all_rows = not args and isinstance(keep, int) and keep == 0
        head, rows = _with_new_rows(self.lm_head)
        balanced = kwargs.get("output_router_logits")
        if balanced is None:
            balanced = getattr(self.config, "output_router_logits", False)
        skip = skip and not (routed and balanced and skip_logits is None)
        if not skip or not all_rows or self.loss_function is not ForCausalLMLoss or not _is_plain(head):
            return plain(self, *args, return_dict=True, **kwargs)
        ours = ("labels", "logits_to_keep", "output_router_logits")
        kwargs = {name: value for name, value in kwargs.items() if name not in ours}
        outputs = self.model(**kwargs)
        shifted = kwargs.get("shift_labels")
        ignore_index = kwargs.get("ignore_index", -100)
        if shifted is None:  # token t is compared with label t + 1
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        chosen = operations(head.weight)
        loss = linear_cross_entropy(
            outputs.last_hidden_state,
            head.weight,
            shifted,
            head.bias,
            num_items=kwargs.get("num_items_in_batch"),
            ignore_index=ignore_index,
            rows=rows,
            summed=None if chosen is None else chosen.summed_loss,
        )
        made = MoeCausalLMOutputWithPast if routed else CausalLMOutputWithPast
        return made(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    return forward
