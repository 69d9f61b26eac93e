"""Optimizer state as a dictionary of plain tensors: written, and read back only if all of it fits.

What is written is torch's layout with one more key::

    {"state": {0: {"step": tensor(7.), "state1": ..., "absmax1": ..., ...}, ...},
     "param_groups": [...],
     "halfbyte": {"version": 1, "seed": 0}}

float32 states carry torch's names, so torch's AdamW reads them and this reads torch's. bitsandbytes' AdamW8bit is read
as it is (its tensors lie under "__bnb_optimizer_quant_state__") and written by `write_bitsandbytes`.

`read` checks everything before it returns anything, so a state dict that does not fit changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.formats.codebooks import MOMENT1_8BIT, MOMENT2_8BIT
from halfbyte.optim.states import State, kind_of, state_specs

VERSION = 1
_TAG = "halfbyte"
_BNB = "__bnb_optimizer_quant_state__"
# What a group takes over from a state dict; schedulers keep the learning rate they started from in it.
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "initial_lr")


@dataclass(frozen=True)
class Expected:
    """What an optimizer needs for one parameter: its name for messages, the kind of state, its shape."""

    name: str
    kind: str
    shape: tuple[int, ...]
    master: bool


@dataclass(frozen=True)
class Found:
    """A state dict that fits: (step, tensors) of each parameter or None, settings of each group, the seed if known."""

    states: list[tuple[int, State] | None]
    settings: list[dict[str, Any]]
    seed: int | None


def write(packed: dict[str, Any], seed: int, *, copy: bool) -> dict[str, Any]:
    """Complete what torch's `Optimizer.state_dict` returned.

    Args:
        packed: the optimizer's own state, by position; not changed.
        seed: of stochastic rounding.
        copy: whether tensors are copied (views of a file would save the whole file).
    """
    states = {}
    for number, state in packed["state"].items():
        tensors = {name: t.clone() if copy else t for name, t in state.items() if name != "step"}
        states[number] = {"step": torch.tensor(float(state["step"])), **tensors}
    return {**packed, "state": states, _TAG: {"version": VERSION, "seed": seed}}


def write_bitsandbytes(packed: dict[str, Any]) -> dict[str, Any]:
    """The same as bitsandbytes' AdamW8bit writes it.

    Raises:
        RequestError: a state that bitsandbytes does not have.
    """
    states = {}
    for number, state in packed["state"].items():
        kind = kind_of(state)
        if kind == "4bit" or "master" in state:
            raise RequestError("bitsandbytes has neither 4-bit states nor masters; use state='8bit', bf16='stochastic'")
        if kind == "float32":
            tensors = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        else:
            device = state["state1"].device
            tensors = {name: state[name] for name in ("state1", "state2", "absmax1", "absmax2")}
            tensors |= {"qmap1": MOMENT1_8BIT.table(device), "qmap2": MOMENT2_8BIT.table(device)}
        states[number] = {"step": int(state["step"]), _BNB: {name: t.clone() for name, t in tensors.items()}}
    unknown = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    groups = [{**unknown, **{k: v for k, v in group.items() if k != "state"}} for group in packed["param_groups"]]
    return {"state": states, "param_groups": groups}


def read(state_dict: Mapping[str, Any], expected: Sequence[Sequence[Expected]]) -> Found:
    """Read a state dict of this package, of torch's AdamW or of bitsandbytes' AdamW8bit.

    Args:
        state_dict: as `write`, torch or bitsandbytes made it.
        expected: what the optimizer needs, by group.

    Raises:
        CheckpointError: it does not fit, with the first thing that does not.
    """
    try:
        tag, groups, states = state_dict.get(_TAG), state_dict["param_groups"], state_dict["state"]
        numbers = [list(group["params"]) for group in groups]
        seed = None if tag is None else int(tag["seed"])
        version = VERSION if tag is None else tag["version"]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError("this is no optimizer state, or a damaged one: it lacks state or param_groups.") from None
    if version != VERSION:
        raise CheckpointError(f"the optimizer state has format {version}, and this halfbyte reads format {VERSION}.")
    if [len(group) for group in numbers] != [len(group) for group in expected]:
        raise CheckpointError(
            f"the optimizer state has groups of {[len(group) for group in numbers]} parameters, the optimizer of "
            f"{[len(group) for group in expected]}."
        )
    found: list[tuple[int, State] | None] = []
    for group, wanted_group in zip(numbers, expected, strict=True):
        for number, wanted in zip(group, wanted_group, strict=True):
            state = states.get(number)
            found.append(None if not state else _checked(state, wanted))
    settings = [{key: group[key] for key in _SETTINGS if key in group} for group in groups]
    for setting in settings:
        if "betas" in setting:  # bitsandbytes has room for a third one
            setting["betas"] = tuple(setting["betas"])[:2]
    return Found(found, settings, seed)


def _checked(state: Mapping[str, Any], wanted: Expected) -> tuple[int, State]:
    """One parameter's state under our names, if it has what is wanted."""
    tensors = _our_names(state, wanted)
    try:
        kind, step = kind_of(tensors), int(state["step"])
    except (StopIteration, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"the optimizer state of {wanted.name} is damaged: it has {', '.join(map(str, state)) or 'nothing'}."
        ) from None
    if kind != wanted.kind:
        raise CheckpointError(
            f"the optimizer state of {wanted.name} is {kind}, and this optimizer keeps it in {wanted.kind}; make it "
            f"with state={kind!r} (keep_float32 names what stays float32)."
        )
    specs = state_specs(kind, wanted.shape, master=wanted.master)
    if set(tensors) != set(specs):
        difference = sorted(set(tensors) ^ set(specs))
        raise CheckpointError(f"the optimizer state of {wanted.name} lacks or should lack {', '.join(difference)}.")
    for name, (dtype, shape) in specs.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} of {wanted.name} is {tensor.dtype} {tuple(tensor.shape)} in the optimizer state, and has to "
                f"be {dtype} {shape}."
            )
        if dtype == torch.float32 and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} of {wanted.name} is not finite in the optimizer state.")
    if step < 1:
        raise CheckpointError(f"the optimizer state of {wanted.name} is damaged: its step is {step}.")
    return step, tensors


def _our_names(state: Mapping[str, Any], wanted: Expected) -> State:
    """The tensors of a state, whoever wrote it."""
    tensors = {name: value for name, value in state.items() if name != "step" and name != _BNB}
    tensors |= state.get(_BNB, {})
    for name, book in (("qmap1", MOMENT1_8BIT), ("qmap2", MOMENT2_8BIT)):
        table = tensors.pop(name, None)
        if table is not None and not torch.equal(table.float().cpu(), book.table()):
            raise CheckpointError(f"{name} of {wanted.name} is not the dynamic map that 8-bit states are read with.")
    if "state1" in tensors and "state2" in tensors and tensors["state1"].dtype == torch.float32:
        tensors["exp_avg"], tensors["exp_avg_sq"] = tensors.pop("state1"), tensors.pop("state2")
    if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(f"the optimizer state of {wanted.name} is damaged: it holds something but tensors.")
    return tensors
