"""AdamW with float32, 8-bit or 4-bit state, in memory or paged, many tensors to a call.

The arithmetic is in `kernels` (`kernels/reference/adamw.py` says which), the states' layouts in `states`, where they
lie in `paging`, what is saved in `checkpoint`. Here is what makes it an optimizer: which parameter gets which state,
what a step does in which order, and torch's contract.

**A step changes everything or nothing.** Gradients are looked at before anything is changed: their norm over all
parameters is needed for clipping, and it is not finite exactly when a gradient is not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import numpy as np
import torch

from halfbyte.errors import NonFiniteError, RequestError, nearest
from halfbyte.kernels.adamw import make_batch, make_device_batch, why_not_captured
from halfbyte.kernels.slots import (
    BLOCK_8BIT,
    KINDS,
    Batch,
    DeviceBatch,
    Options,
    Slot,
    device_keys,
    is_capturing,
    make_options,
    random_keys,
    refuse_capture,
)
from halfbyte.optim import capture, checkpoint
from halfbyte.optim.paging import FileArena, HostBatch, HostPager
from halfbyte.optim.states import (
    MIN_LOW_BIT_SIZE,
    State,
    allocate_plain,
    can_be_split,
    new_state,
    slot_of,
    state_bytes,
)

StateKind = Literal["float32", "8bit", "4bit"]
# What the usual names of embeddings contain; bitsandbytes' advice is to keep their state in float32.
EMBEDDINGS = ("embed", "wte", "wpe")


@dataclass
class _Piece:
    """Slots that are stepped together, and the parameters they belong to, in the same order."""

    batch: Batch
    slots: list[Slot]
    params: list[torch.Tensor]
    numbers: torch.Tensor | None = None  # of the slots, where they have to be on the device

    @property
    def grads(self) -> list[torch.Tensor | None]:
        return [param.grad for param in self.params]


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose state may be 8-bit (arXiv 2110.02861) or 4-bit (arXiv 2309.01507), and paged.

    Args:
        params: float32 or bfloat16 parameters, groups of them, or named parameters (`model.named_parameters()`);
            names are needed for `keep_float32` and make errors speak. A group may set any of the next five.
        lr: learning rate, a number or a tensor.
        betas: decay rates of the two moments.
        eps: what is added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        state: "float32" (8 bytes a parameter), "8bit" (2.03), "4bit" (1.03). Parameters of fewer than 4096 elements and
            those of `keep_float32` have float32 state whatever is said here.
        keep_float32: parameters whose name contains one of these keep float32 state.
        bf16: how a bfloat16 parameter is updated: "stochastic" rounding, or from a float32 "master" kept beside it.
        seed: of stochastic rounding; rounding depends on it, on the step and on the element, and on nothing else.
        max_grad_norm: gradients are scaled down to this norm over all parameters, in the step and without changing
            them; `grad_norm` has the norm afterwards.
        check_finite: refuse a gradient that is not finite before anything is changed. Without it, and without
            `max_grad_norm`, gradients are read once instead of twice.
        paged: False, "file" (states in a temporary file; Linux) or "host" (states of CUDA parameters in pinned host
            memory).
        page_budget: bytes of paged state that may be resident at a time.
        page_dir: folder of the file; None: the system's folder for temporary files.
        capturable: keep step numbers and what follows from them on the GPU, so that a CUDA graph may hold a step; make
            one before the capture, which allocates the states. A learning rate that is a tensor on the GPU is read at
            each replay, and other settings stay what they were. No host can look at gradients then: a step whose
            gradients are not finite changes nothing and says nothing, and `grad_norm` is a tensor. Not with 4-bit
            states, which are stepped with numbers of the host, nor with `paged`, where the host decides what is moved.

    Raises:
        RequestError: a setting that is not offered, or a parameter that cannot be stepped.
        OutputError: the file's disk is full (at the first step, before anything is changed).
        NonFiniteError: from `step`: a gradient is not finite; the message names the first, and nothing was changed.
    """

    # budget: the settings of an optimizer are keyword arguments of one call, as everywhere in torch
    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state: StateKind = "float32",
        *,
        keep_float32: Sequence[str] = EMBEDDINGS,
        bf16: Literal["stochastic", "master"] = "stochastic",
        seed: int = 0,
        max_grad_norm: float | None = None,
        check_finite: bool = True,
        paged: Literal[False, "file", "host"] = False,
        page_budget: int = 1 << 28,
        page_dir: str | None = None,
        capturable: bool = False,
    ) -> None:
        _choice("bf16", bf16, ("stochastic", "master"))
        _choice("paged", paged, (False, "file", "host"))
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise RequestError(f"max_grad_norm is {max_grad_norm}; give a number above 0, or None.")
        if paged and page_budget < 1 << 16:
            raise RequestError(f"page_budget is {page_budget} bytes; give at least 65536.")
        if paged and capturable:
            raise RequestError(f"paged={paged!r} has the host move states in each step; choose it or capturable=True.")
        self.keep_float32, self.bf16, self.seed = tuple(keep_float32), bf16, int(seed)
        self.max_grad_norm, self.check_finite = max_grad_norm, check_finite
        self.paged, self.page_budget, self.page_dir = paged, int(page_budget), page_dir
        self.capturable = bool(capturable)
        self.grad_norm: float | torch.Tensor | None = None
        self._reset()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        super().__init__(params, defaults)

    def _reset(self) -> None:
        self._pieces: list[_Piece] | None = None  # made when a step needs them, from the states there are then
        self._arena = _arena(self.paged, self.page_dir)
        self._pager = HostPager() if self.paged == "host" else None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("keep_float32", "bf16", "seed", "max_grad_norm", "check_finite", "paged", "page_budget", "page_dir")
        settings = {name: getattr(self, name) for name in (*kept, "capturable")}
        return {**super().__getstate__(), **settings, "grad_norm": self.grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own or the optimizer's.

        Raises:
            RequestError: a setting that is not offered, or a parameter that cannot be stepped.
        """
        checked = {**self.defaults, **{k: v for k, v in param_group.items() if k != "params"}}
        _check_group(checked)
        if self.capturable and checked["state"] == "4bit":
            raise RequestError(
                "state='4bit' is stepped with numbers of the host; with capturable=True choose '8bit' or 'float32'."
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"] = tuple(group["betas"])
        try:
            for param, name in zip(group["params"], self._names(len(self.param_groups) - 1), strict=True):
                self._check_param(param, name)
        except RequestError:
            self.param_groups.pop()
            raise
        self._pieces = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = self._prepare()
        if self.capturable:
            self._step_on_device(pieces)
        else:
            self._step_from_host(pieces)
        return loss

    def _step_from_host(self, pieces: list[_Piece]) -> None:
        if any(is_capturing(piece.params[0].device) for piece in pieces):
            raise RequestError(
                "this AdamW takes numbers from the host at each step, and a CUDA graph would repeat those of its "
                "capture; make it with capturable=True."
            )
        scale = self._grad_scale(pieces)
        options: dict[tuple[int, int], int] = {}
        values: list[Options] = []
        plan: dict[torch.Tensor, tuple[int, int]] = {}  # parameter -> (its position in `values`, its step)
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                state = self.state[param]
                state["step"] += 1
                at = options.setdefault((number, state["step"]), len(values))
                if at == len(values):
                    values.append(make_options(group, state["step"], scale))
                plan[param] = (at, state["step"])
        for piece in self._in_turn(pieces):
            which, steps = zip(*(plan.get(param, (0, 0)) for param in piece.params), strict=True)
            numbers = np.array([slot.number for slot in piece.slots], dtype=np.int64)
            keys = random_keys(self.seed, np.array(steps, dtype=np.int64), numbers)
            if values:
                piece.batch.step(piece.grads, values, which, keys)

    def _step_on_device(self, pieces: list[_Piece]) -> None:
        """The same, and no number comes from the host or goes there."""
        batches = [cast(DeviceBatch, piece.batch) for piece in pieces]
        squares = []
        if self.max_grad_norm is not None or self.check_finite:
            squares = [batch.squares(piece.grads) for batch, piece in zip(batches, pieces, strict=True)]
        norm = self.grad_norm = capture.norm_of(squares) if squares else None
        for batch, piece in zip(batches, pieces, strict=True):
            counts = [self.state[param]["step"] for param in piece.params]
            stepped = [count for count, grad in zip(counts, piece.grads, strict=True) if grad is not None]
            if stepped:
                scale = capture.advance(stepped, norm, self.max_grad_norm)
                steps = torch.stack(counts)
                options, weights1 = capture.options_of(self.param_groups, piece.params, steps, scale)
                keys = device_keys(self.seed, steps, cast(torch.Tensor, piece.numbers))
                batch.step_on_device(piece.grads, options, weights1, keys)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` reads: plain tensors and numbers, with a version. Paged states come as copies."""
        return checkpoint.write(super().state_dict(), self.seed, copy=bool(self.paged))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state dict of this class, of torch's AdamW or of bitsandbytes' AdamW8bit.

        Learning rate, betas, eps and weight decay are taken over, the kind of state is not: it has to be the one that
        this optimizer was made with.

        Raises:
            CheckpointError: it does not fit or is damaged; nothing was changed.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, dict(state_dict)) or state_dict
        expected = [
            [self._expected(group, param, name) for param, name in zip(group["params"], self._names(n), strict=True)]
            for n, group in enumerate(self.param_groups)
        ]
        found = checkpoint.read(state_dict, expected)
        self._reset()
        self.state.clear()
        params = [param for group in self.param_groups for param in group["params"]]
        for param, loaded in zip(params, found.states, strict=True):
            if loaded is None:
                continue
            step, tensors = loaded
            state = {name: self._allocate(tensor.dtype, tensor.shape, param.device) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
            self.state[param] = {"step": self._count(step, param), **state}
            self._release()
        for group, settings in zip(self.param_groups, found.settings, strict=True):
            group.update(settings)
        self.seed = self.seed if found.seed is None else found.seed
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as `bitsandbytes.optim.AdamW8bit.load_state_dict` reads it.

        Raises:
            RequestError: a parameter has 4-bit state or a float32 master, which bitsandbytes does not have.
        """
        return checkpoint.write_bitsandbytes(super().state_dict())

    @property
    def state_nbytes(self) -> int:
        """Bytes of all states, counted from their tensors."""
        return sum(state_bytes(state) for state in self.state.values())

    def _names(self, number: int) -> list[str]:
        group = self.param_groups[number]
        return group.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(group["params"]))]

    def _kind(self, group: Mapping[str, Any], param: torch.Tensor, name: str) -> str:
        kept = param.numel() < MIN_LOW_BIT_SIZE or (
            "param_names" in group and any(part in name for part in self.keep_float32)
        )
        return "float32" if kept else str(group["state"])

    def _expected(self, group: Mapping[str, Any], param: torch.Tensor, name: str) -> checkpoint.Expected:
        return checkpoint.Expected(name, self._kind(group, param, name), tuple(param.shape), self._has_master(param))

    def _has_master(self, param: torch.Tensor) -> bool:
        return self.bf16 == "master" and param.dtype == torch.bfloat16

    def _check_param(self, param: torch.Tensor, name: str) -> None:
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise RequestError(f"{name} is {param.dtype}; AdamW steps float32 and bfloat16 parameters.")
        if param.layout != torch.strided:
            raise RequestError(f"{name} is {param.layout}; AdamW steps dense parameters.")
        why = why_not_captured(param.device) if self.capturable else ""
        if why:
            raise RequestError(f"capturable=True is not offered for {name}: {why}; leave it out.")
        if self.paged == "host" and param.device.type != "cuda":
            raise RequestError(f"paged='host' needs a CUDA device, and {name} is on {param.device}; choose 'file'.")
        if self.paged == "file" and param.device.type != "cpu":
            raise RequestError(f"paged='file' is for the CPU, and {name} is on {param.device}; choose 'host'.")

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        if self._arena is not None:
            return self._arena.allocate(dtype, shape, device)
        if self._pager is not None:
            return self._pager.allocate(dtype, shape, device)
        return allocate_plain(dtype, shape, device)

    def _release(self) -> None:
        if self._arena is not None:
            self._arena.release()

    def _count(self, step: int, param: torch.Tensor) -> int | torch.Tensor:
        return torch.tensor(float(step), dtype=torch.float64, device=param.device) if self.capturable else step

    def _prepare(self) -> list[_Piece]:
        """States for parameters that have their first gradient, and the pieces of work."""
        for number, group in enumerate(self.param_groups):
            for at, param in enumerate(group["params"]):
                if param.grad is not None and param.numel() and "step" not in self.state.get(param, ()):
                    name = self._names(number)[at]
                    self._check_param(param, name)
                    kind, master = self._kind(group, param, name), self._has_master(param)
                    refuse_capture(param.device)
                    state = new_state(param, kind, master=master, allocate=self._allocate)
                    self.state[param] = {"step": self._count(0, param), **state}
                    self._release()
                    self._pieces = None
        if self._pieces is None:
            self._pieces = list(self._make_pieces())
        return self._pieces

    def _make_pieces(self) -> Iterator[_Piece]:
        """One piece a device; for paged states as many as keep each within the budget."""
        slots: list[Slot] = []
        size = 0
        budget = self._piece_budget
        for slot, nbytes in self._ranges():
            full = self.paged and size + nbytes > budget
            if slots and (full or slots[-1].param.device != slot.param.device):
                yield self._piece(slots)
                slots, size = [], 0
            slots.append(slot)
            size += nbytes
        if slots:
            yield self._piece(slots)

    @property
    def _piece_budget(self) -> int:
        return self.page_budget // (HostPager.PIECES_AT_ONCE if self._pager is not None else 1)

    def _piece(self, slots: list[Slot]) -> _Piece:
        if self._pager is not None:
            return _Piece(self._pager.batch(slots), slots, [slot.param for slot in slots])
        params = [slot.param for slot in slots]
        if not self.capturable:
            return _Piece(make_batch(slots), slots, params)
        refuse_capture(params[0].device)
        numbers = torch.tensor([slot.number for slot in slots], device=params[0].device)
        return _Piece(make_device_batch(slots), slots, params, numbers)

    def _ranges(self) -> Iterator[tuple[Slot, int]]:
        """Every parameter as a slot, or as several where its state is larger than the budget, with its bytes."""
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in enumerate(params):
            state: State = {k: v for k, v in self.state.get(param, {}).items() if k != "step"}
            if not state:
                continue
            nbytes, count, budget = state_bytes(state), param.numel(), self._piece_budget
            if not self.paged or nbytes <= budget:
                yield slot_of(param, state, number), nbytes
                continue
            if not can_be_split(state):
                raise RequestError(
                    f"page_budget is {self.page_budget} bytes, but the 4-bit state of one matrix takes {nbytes} and is "
                    "stepped whole; give a larger budget."
                )
            length = count * budget // nbytes // BLOCK_8BIT * BLOCK_8BIT
            for first in range(0, count, length):
                some = min(length, count - first)
                yield slot_of(param, state, number, first, some), math.ceil(nbytes * some / count)

    def _in_turn(self, pieces: list[_Piece]) -> Iterator[_Piece]:
        """The pieces, each fetched while the one before it is stepped and given back afterwards."""
        for number, piece in enumerate(pieces):
            following = pieces[number + 1] if number + 1 < len(pieces) else None
            if following is not None and self._arena is not None:
                self._arena.fetch([t for slot in following.slots for t in (slot.moment1, slot.moment2)])
            if following is not None and isinstance(following.batch, HostBatch):
                following.batch.fetch()
            yield piece
            self._release()
        if self._pager is not None:
            self._pager.finish()

    def _grad_scale(self, pieces: list[_Piece]) -> float:
        """What gradients are multiplied by; looks at all of them first.

        Raises:
            NonFiniteError: one is not finite.
        """
        if self.max_grad_norm is None and not self.check_finite:
            return 1.0
        total = 0.0
        for piece in pieces:
            sums = piece.batch.norms(piece.grads)
            total += math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan
        if not math.isfinite(total):
            raise NonFiniteError(f"the gradient of {self._first_not_finite()} is not finite; no parameter was changed.")
        self.grad_norm = math.sqrt(total)
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_

    def _first_not_finite(self) -> str:
        for number, group in enumerate(self.param_groups):
            for param, name in zip(group["params"], self._names(number), strict=True):
                if param.grad is not None and not torch.isfinite(param.grad).all():
                    return name
        return "a parameter"


def _arena(paged: Any, folder: str | None) -> FileArena | None:
    if paged != "file":
        return None
    if sys.platform != "linux":
        raise RequestError(f"paged='file' needs Linux, and this is {sys.platform}; choose paged=False.")
    return FileArena(folder)


def _choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or value == choice for choice in choices) or value is True:
        raise RequestError(f"{key} is {value!r}, which is not offered; {nearest(str(value), map(str, choices))}")


def _check_group(group: Mapping[str, Any]) -> None:
    """Settings of a group are what the step can compute with.

    Raises:
        RequestError: one is not.
    """
    _choice("state", group["state"], KINDS)
    if not float(group["lr"]) >= 0:
        raise RequestError(f"lr is {float(group['lr'])}; give a number of at least 0.")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise RequestError(f"betas are {group['betas']}; give two numbers of at least 0 and below 1.")
    for key in ("eps", "weight_decay"):
        if not group[key] >= 0:
            raise RequestError(f"{key} is {group[key]}; give a number of at least 0.")
