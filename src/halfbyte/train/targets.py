"""Which linear modules get an adapter, checked on a model without weights.

A model on the meta device is built from its config in a moment and has every module name and shape, so a target that
matches nothing or a rank that is too high is told before a single weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from halfbyte.train.recipe import Recipe

Shapes = dict[str, tuple[int, int]]
_ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention|self_attention)([._]|$)")


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    Attributes:
        shapes: names of its linear modules, with output and input features; without those of the head and the output
            embeddings, which are no targets (peft's "all-linear" leaves them out too).
        head: names of the modules between a classifier's encoder and its answer; empty for a language model.
        parameters: of the whole model, shared ones counted once.
    """

    shapes: Shapes
    head: tuple[str, ...]
    parameters: int = 0


def outline(config: PretrainedConfig, task: str = "causal-lm") -> Outline:
    """What a config describes, built on the meta device.

    Raises:
        RequestError: transformers has no model of this type for the task.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    from halfbyte.models import TASKS

    try:
        with torch.device("meta"):
            model = getattr(transformers, TASKS[task]).from_config(config)
    except ValueError:
        raise RequestError(f"task {task} is not offered by a model of type {config.model_type!r}.") from None
    head = () if task == "causal-lm" else _head(model)
    output = model.get_output_embeddings()
    shapes: Shapes = {}
    for name, module in model.named_modules():
        if module is output or any(f".{part}." in f".{name}." for part in head):
            continue
        if isinstance(module, Conv1D):  # GPT-2's, stored transposed
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
        elif isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
    return Outline(shapes, head, sum(parameter.numel() for parameter in model.parameters()))


def _head(model: Any) -> tuple[str, ...]:
    """All modules with weights beside the encoder, and the encoder's pooler."""
    body = model.base_model_prefix
    beside = [name for name, module in model.named_children() if name != body and list(module.parameters())]
    inside = [name for name, _ in getattr(model, body).named_children() if name == "pooler"]
    return tuple(dict.fromkeys(beside + inside))


def check_targets(recipe: Recipe, shapes: Shapes) -> str | list[str]:
    """Resolve `target_modules` to what peft takes, and check names and ranks.

    Args:
        recipe: what is asked for.
        shapes: the model's linear modules, see `Outline`.

    Returns:
        "all-linear", or module names.

    Raises:
        RequestError: a target matches no linear module, or a rank is above the smaller side of a module's matrix.
    """
    targets: str | list[str]
    if recipe.target_modules == "all-linear":
        chosen, targets = list(shapes), "all-linear"
    elif recipe.target_modules == "attention":
        chosen = [name for name in shapes if in_attention(name)]
        targets = _suffixes(chosen, shapes)
        if not chosen:
            raise RequestError(f"target_modules 'attention' matches nothing; {nearest('attention', _leaves(shapes))}.")
    else:
        chosen, targets = [], list(recipe.target_modules)
        for target in targets:
            matches = [name for name in shapes if matches_name(name, target)]
            if not matches:
                raise RequestError(
                    f"target_modules {target!r} matches no linear module; {nearest(target, _leaves(shapes))}"
                )
            chosen += matches
    _check_ranks(recipe, {name: shapes[name] for name in chosen})
    return targets


def adapted_modules(shapes: Shapes, targets: str | list[str]) -> Shapes:
    """The modules that get an adapter; `targets` as `check_targets` gives them."""
    if isinstance(targets, str):
        return shapes
    return {name: shape for name, shape in shapes.items() if any(matches_name(name, target) for target in targets)}


def in_attention(name: str) -> bool:
    """Whether a module is one of attention's projections."""
    return _ATTENTION.search(name) is not None


def matches_name(name: str, target: str) -> bool:
    """peft's rule: the whole name, or its last parts."""
    return name == target or name.endswith("." + target)


def _check_ranks(recipe: Recipe, shapes: Shapes) -> None:
    for pattern in recipe.rank_pattern:
        if not any(_matches_pattern(name, pattern) for name in shapes):
            raise RequestError(f"rank_pattern {pattern!r} matches no module; {nearest(pattern, _leaves(shapes))}")
    for name, (rows, columns) in shapes.items():
        rank = next((r for p, r in recipe.rank_pattern.items() if _matches_pattern(name, p)), recipe.lora_r)
        if rank > min(rows, columns):
            raise RequestError(
                f"lora_r {rank} is above the rank of {name} ({rows} x {columns}); choose at most {min(rows, columns)}."
            )


def _matches_pattern(name: str, pattern: str) -> bool:
    """peft's rule for rank_pattern and alpha_pattern: a regular expression for the end of the name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _leaves(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _suffixes(chosen: list[str], names: Iterable[str]) -> list[str]:
    """The shortest endings that match all chosen names and none of the others, so that an adapter's config stays
    readable: `q_proj`, but `attention.output.dense` where plain `dense` would match the feed-forward layer too.
    """
    others = set(names) - set(chosen)
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        found[next(ending for ending in endings if not any(matches_name(other, ending) for other in others))] = None
    return list(found)


def trainable_report(model: nn.Module) -> dict[str, Any]:
    """How many parameters are trained, and in which dtypes their masters are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trained}),
    }
