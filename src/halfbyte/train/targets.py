"""Which matrices get an adapter, checked on a model without weights.

A model on the meta device is built from its config in a moment and has every name and shape, so a target that matches
nothing or a rank that is too high is told before a single weight is read.

Experts are one 3-D parameter for all of them and no linear modules. peft reaches them by `target_parameters`, and its
"all-linear" is not to be left to it: for some families it means the experts (at twice the rank) and their router too,
for others it leaves the experts out without a word, and some shared experts it loses (peft#3711). Here it means every
linear layer of the architecture, the experts' among them, but no router: what chooses stays as it was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from halfbyte.train.recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]
_ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention|self_attention)([._]|$)")
_PEFTS_OWN_STARTS = ("orthogonal", "pissa", "olora", "loftq")  # of init_lora_weights: they read a linear layer's weight


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    Attributes:
        shapes: names of its linear modules, with output and input features; without those of the head and the output
            embeddings, which are no targets (peft's "all-linear" leaves them out too).
        head: names of the modules between a classifier's encoder and its answer; empty for a language model.
        parameters: of the whole model, shared ones counted once.
        experts: names of its 3-D parameters, with experts, output and input features.
        routers: names of the weights that choose experts, or scale a shared one, with outputs and inputs. Those that
            are a linear module's are in `shapes` as well.
        renamed: those of `shapes` that peft takes for names of experts when they are `target_modules`.
    """

    shapes: Shapes
    head: tuple[str, ...]
    parameters: int = 0
    experts: Shapes = field(default_factory=dict)
    routers: Shapes = field(default_factory=dict)
    renamed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Targets:
    """What gets an adapter.

    Attributes:
        modules: peft's `target_modules`.
        parameters: peft's `target_parameters`.
        adapted: the matrices, by the name of the module or of the parameter; those of experts with three numbers.
        frozen: the linear layers, experts and routers that get none, and what each is.
    """

    modules: str | list[str]
    parameters: list[str]
    adapted: Shapes
    frozen: Mapping[str, str]

    def summary(self) -> dict[str, list[str]]:
        """Short names, each once, of what is adapted and of what is not."""
        return {"adapted": _short(self.adapted), "not_adapted": _short(self.frozen)}

    def __str__(self) -> str:
        told = f"on {', '.join(_short(self.adapted))}"
        kinds = list(dict.fromkeys(self.frozen.values()))
        rest = [
            f"{kind} ({', '.join(_short(name for name, its in self.frozen.items() if its == kind))})" for kind in kinds
        ]
        return f"{told}; none on {', '.join(rest)}" if rest else told


def outline(config: PretrainedConfig, task: str = "causal-lm") -> Outline:
    """What a config describes, built on the meta device.

    Raises:
        RequestError: transformers has no model of this type for the task.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    from halfbyte.models import TASKS
    from halfbyte.nn.replace import EXPERTS, make_plan

    try:
        with torch.device("meta"):
            model = getattr(transformers, TASKS[task]).from_config(config)
    except ValueError:
        raise RequestError(f"task {task} is not offered by a model of type {config.model_type!r}.") from None
    head = () if task == "causal-lm" else _head(model)
    output = model.get_output_embeddings()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if module is output or any(f".{part}." in f".{name}." for part in head):
            continue
        if isinstance(module, Conv1D):  # GPT-2's, stored transposed
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
        elif isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
    experts = {name: _by_expert(model, name) for name, kind in make_plan(model).chosen.items() if kind == EXPERTS}
    routers: dict[str, tuple[int, ...]] = {}
    for name, (count, _, _) in experts.items():
        routers |= _routers(model, name.rpartition(".")[0], count)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Outline(shapes, head, parameters, experts, routers, _renamed(model, shapes) if experts else frozenset())


def _by_expert(model: nn.Module, name: str) -> tuple[int, int, int]:
    """Experts, output and input features of a 3-D parameter, whichever way it is stored."""
    count, rows, columns = model.get_parameter(name).shape
    turned = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
    return (count, columns, rows) if turned else (count, rows, columns)


def _routers(model: nn.Module, experts: str, count: int) -> dict[str, tuple[int, ...]]:
    """The routers beside a module of experts: neighbours whose matrices have as many rows as there are experts, or 1.

    Their names differ from family to family. A shared expert may have as many features between its projections, but its
    last one has more rows.
    """
    block, _, own = experts.rpartition(".")
    found = {}
    for child, module in model.get_submodule(block).named_children():
        matrices = [(name, p) for name, p in module.named_parameters() if p.dim() == 2]
        if child != own and matrices and all(len(p) in (1, count) for _, p in matrices):
            name, matrix = matrices[0]  # behind it a correction of the choice, in Ernie
            found[".".join(part for part in (block, child, name) if part)] = tuple(matrix.shape)
    return found


def _renamed(model: Any, shapes: Shapes) -> frozenset[str]:
    """The modules that peft would not adapt under their own names.

    transformers 5 made one parameter of many modules of experts, and peft turns the names that they had before
    (`gate_proj`, `w1`) into that parameter's, also where a module has such a name today: a shared expert, a dense
    layer. What it does is asked of peft itself.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before 0.19 peft did nothing of the kind
        return frozenset()

    def keeps(leaf: str) -> bool:
        asked = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(asked, model=model, conversions=None)
        except ValueError:  # it wants the other half of a pair that it makes one of
            return False
        return leaf in (asked.target_modules or ())

    lost = {leaf for leaf in {name.rpartition(".")[2] for name in shapes} if not keeps(leaf)}
    return frozenset(name for name in shapes if name.rpartition(".")[2] in lost)


def _head(model: Any) -> tuple[str, ...]:
    """All modules with weights beside the encoder, and the encoder's pooler."""
    body = model.base_model_prefix
    beside = [name for name, module in model.named_children() if name != body and list(module.parameters())]
    inside = [name for name, _ in getattr(model, body).named_children() if name == "pooler"]
    return tuple(dict.fromkeys(beside + inside))


def check_targets(recipe: Recipe, form: Outline) -> Targets:
    """Resolve `target_modules` and `target_parameters` to what peft takes, and check names and ranks.

    Args:
        recipe: what is asked for.
        form: of the model.

    Raises:
        RequestError: a target matches nothing, nothing is left to train, a rank is above the smaller side of a matrix,
            or experts are to get what peft has for linear layers only.
    """
    modules, chosen = _modules(recipe, form)
    parameters, of_experts = _parameters(recipe, form)
    renamed = [name for name in chosen if name in form.renamed]
    if renamed and isinstance(modules, list):
        # As parameters their weights keep their names, and an adapter's file is the same either way.
        kept = [name for name in chosen if name not in form.renamed]
        modules = _suffixes(kept, form.shapes)
        parameters = [*parameters, *(f"{ending}.weight" for ending in _suffixes(renamed, form.shapes))]
    adapted = {**{name: form.shapes[name] for name in chosen}, **of_experts}
    if not adapted:
        raise RequestError("target_modules and target_parameters are both empty; name something to train.")
    _check_ranks(recipe, adapted)
    if parameters:
        _check_parameters(recipe, of_experts, renamed)
    return Targets(modules, parameters, adapted, _frozen(form, adapted))


def _frozen(form: Outline, adapted: Shapes) -> dict[str, str]:
    """The rest of what could have an adapter, and what each is."""
    held = sum(math.prod(shape) for name, shape in form.experts.items() if name not in adapted)
    experts = f"experts, {held / max(form.parameters, 1):.0%} of the parameters"
    kinds = dict.fromkeys(form.shapes, "linear layers") | dict.fromkeys(form.experts, experts)
    kinds |= dict.fromkeys((_module(form, name) for name in form.routers), "routers")
    return {name: kind for name, kind in kinds.items() if name not in adapted}


def _modules(recipe: Recipe, form: Outline) -> tuple[str | list[str], list[str]]:
    """What peft takes as `target_modules`, and the modules that these are."""
    shapes, asked = form.shapes, recipe.target_modules
    if asked == "all-linear" and not form.experts:
        return "all-linear", list(shapes)
    if isinstance(asked, str):
        routers = {_module(form, name) for name in form.routers}
        chosen = [name for name in shapes if name not in routers and (asked == "all-linear" or in_attention(name))]
        if not chosen:
            raise RequestError(f"target_modules {asked!r} matches nothing; {nearest(asked, _leaves(shapes))}.")
        return _suffixes(chosen, shapes), chosen
    chosen = []
    for target in asked:
        matches = [name for name in shapes if matches_name(name, target)]
        if not matches:
            more = " (those of experts are target_parameters)" if form.experts else ""
            raise RequestError(
                f"target_modules {target!r} matches no linear module{more}; {nearest(target, _leaves(shapes))}"
            )
        chosen += matches
    return list(asked), list(dict.fromkeys(chosen))


def _parameters(recipe: Recipe, form: Outline) -> tuple[list[str], Shapes]:
    """What peft takes as `target_parameters`, and the parameters that these are."""
    asked = recipe.target_parameters
    if asked is None:
        asked = "experts" if recipe.target_modules == "all-linear" and form.experts else ()
    if asked == "experts":
        if not form.experts:
            raise RequestError(
                "target_parameters is 'experts', but the model has none in a parameter of three dimensions; "
                "leave it out, target_modules names its linear layers."
            )
        return list(dict.fromkeys(map(_in_layer, form.experts))), form.experts
    offered = {**form.experts, **{name: shape for name, shape in form.routers.items() if _module(form, name) == name}}
    chosen: dict[str, tuple[int, ...]] = {}
    for target in asked:
        matches = {name: shape for name, shape in offered.items() if matches_name(name, target)}
        if not matches:
            names = list(dict.fromkeys(map(_in_layer, offered)))
            hint = nearest(target, names) if names else "the model has no experts, leave it out."
            raise RequestError(f"target_parameters {target!r} matches no weight of experts; {hint}")
        chosen |= matches
    return list(asked), chosen


def _check_parameters(recipe: Recipe, of_experts: Shapes, renamed: list[str]) -> None:
    """What peft cannot do for a parameter."""
    name = [*of_experts, *renamed][0]
    out = "leave experts out with target_parameters: []" if of_experts else "leave it out of target_modules"
    for module in recipe.modules_to_save:
        if any(f".{module}." in f".{each}." for each in of_experts):
            raise RequestError(f"modules_to_save {module!r} trains experts whole, which get an adapter besides; {out}.")
    for key, wrong, instead in (
        ("lora_dropout", recipe.lora_dropout > 0, "0"),
        ("use_dora", recipe.use_dora, "false"),
        ("init_lora_weights", recipe.init_lora_weights in _PEFTS_OWN_STARTS, "true"),
    ):
        if wrong:
            raise RequestError(
                f"{key} is {getattr(recipe, key)!r}, which peft has for linear modules and not for {name}; set "
                f"{key}: {instead}, or {out}."
            )


def in_attention(name: str) -> bool:
    """Whether a module is one of attention's projections."""
    return _ATTENTION.search(name) is not None


def matches_name(name: str, target: str) -> bool:
    """peft's rule: the whole name, or its last parts."""
    return name == target or name.endswith("." + target)


def _module(form: Outline, name: str) -> str:
    """A router's linear module, if it is one; every other name stays."""
    module = name.removesuffix(".weight")
    return module if module in form.shapes else name


def _check_ranks(recipe: Recipe, shapes: Shapes) -> None:
    for pattern in recipe.rank_pattern:
        if not any(_matches_pattern(name, pattern) for name in shapes):
            raise RequestError(f"rank_pattern {pattern!r} matches no module; {nearest(pattern, _leaves(shapes))}")
    for name, (*_, rows, columns) in shapes.items():
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


def _in_layer(name: str) -> str:
    """A name from behind the number of its layer on: `mlp.experts.down_proj`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _short(names: Iterable[str]) -> list[str]:
    """For people: a module's last part, or that of a parameter with its module's."""
    parts = (name.removesuffix(".weight").split(".") for name in names)
    return list(dict.fromkeys(".".join(part[-2:] if "expert" in part[-2:][0] else part[-1:]) for part in parts))


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
