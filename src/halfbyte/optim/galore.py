"""GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW whose state is that of a matrix of low rank.

The gradient G of a weight [m, n] is projected to P^T G [rank, n] (to G P^T [m, rank] where m >= n), AdamW makes of that
an update of the same shape, and what the weight moves by is the update projected back. P is made of the first singular
vectors of a gradient and is renewed every `update_interval` steps. The projector is galore-torch's. Its optimizers are
not used: their 8-bit state is bitsandbytes' for CUDA, and their state dict leaves the projectors out (they come back
from a checkpoint as Python objects, or not at all). Here the step is `AdamW`'s, with every kind of state it has, on a
stand-in of low rank for each weight: always zero before a step, and after it the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch

from halfbyte.errors import CheckpointError, NonFiniteError, RequestError
from halfbyte.optim.adamw import AdamW, StateKind

_SHARED = ("lr", "betas", "eps")


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW on projected gradients. Needs the package galore-torch.

    Beside its state, a projected weight [m, n] with m >= n keeps its projection, float32 [rank, n], and its stand-in,
    float32 [m, rank]; with m < n they are [m, rank] and [rank, n].

    Args:
        params: float32 parameters, groups of them, or named parameters. A group may set any of the next seven; one
            with `rank` 0 is stepped as by `AdamW`, and the others hold matrices only.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: what is added to the root of the second moment.
        weight_decay: decoupled; of a projected weight it follows the update, as in galore-torch.
        rank: of the projections, at most the smaller side of a weight.
        update_interval: steps after which a projection is made anew.
        scale: what the update of a projected weight is multiplied by.
        state: "float32", "8bit" or "4bit"; see `AdamW`.
        options: of `AdamW`.

    Raises:
        RequestError: a setting that is not offered, or a parameter that cannot be stepped.
        NonFiniteError: from `step`: a gradient is not finite; no parameter was changed.
    """

    # budget: the settings of an optimizer are keyword arguments of one call, as everywhere in torch
    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        state: StateKind = "float32",
        **options: Any,
    ) -> None:
        self._adamw: AdamW | None = None
        self._options = {"state": state, **options}
        self._projectors: dict[torch.Tensor, Any] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "rank": rank, "update_interval": update_interval, "scale": scale})

    @property
    def adamw(self) -> AdamW:
        """The optimizer of the stand-ins, and of what is not projected."""
        assert self._adamw is not None  # torch refuses an optimizer without a group
        return self._adamw

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own or the optimizer's.

        Raises:
            RequestError: a setting that is not offered, or a parameter that cannot be stepped.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            stepped = [_stand_in(p, group) for p in group["params"]] if group["rank"] else group["params"]
            names = group.get("param_names")
            inner = {key: group[key] for key in _SHARED}
            inner["weight_decay"] = 0.0 if group["rank"] else group["weight_decay"]
            inner["params"] = list(zip(names, stepped, strict=True)) if names else stepped
            if self._adamw is None:
                self._adamw = AdamW([inner], **self._options)
            else:
                self._adamw.add_param_group(inner)
        except RequestError:
            self.param_groups.pop()
            raise

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
        pairs = self._pairs()
        self._refuse_not_finite(pairs)
        for group, inner in zip(self.param_groups, self.adamw.param_groups, strict=True):
            inner.update({key: group[key] for key in _SHARED})
            if not group["rank"]:
                inner["weight_decay"] = group["weight_decay"]
        for weight, stand_in, group in pairs:
            stand_in.grad = self._projected(weight, group).contiguous()
        self.adamw.step()
        for weight, stand_in, group in pairs:
            weight.add_(self._projectors[weight].project_back(stand_in))
            if group["weight_decay"]:
                weight.add_(weight, alpha=-float(group["lr"]) * group["weight_decay"])
            stand_in.zero_()
            stand_in.grad = None
            self.state[weight]["step"] += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` reads: plain tensors and numbers."""
        return {**super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state dict of this class.

        Raises:
            CheckpointError: it does not fit or is damaged; nothing was changed.
        """
        parts = {"adamw": Mapping, "state": Mapping, "param_groups": list}
        if lacking := [key for key, kind in parts.items() if not isinstance(state_dict.get(key), kind)]:
            raise CheckpointError(f"this is no optimizer state of GaLore: it lacks {' and '.join(lacking)}.")
        saved = [list(group["params"]) for group in state_dict["param_groups"]]
        numbers = [number for group in saved for number in group]
        expected = [(p, group) for group in self.param_groups for p in group["params"]]
        if len(numbers) != len(expected):
            raise CheckpointError(f"the optimizer state has {len(numbers)} parameters, the optimizer {len(expected)}.")
        sizes = [len(group) for group in saved], [len(group["params"]) for group in self.param_groups]
        if sizes[0] != sizes[1]:
            raise CheckpointError(f"the optimizer state has groups of {sizes[0]} parameters, the optimizer {sizes[1]}.")
        for number, (param, group) in zip(numbers, expected, strict=True):
            state = state_dict["state"].get(number)
            found = tuple(state["basis"].shape) if state and "basis" in state else "missing"
            if state and found != (wanted := _basis_shape(param, group["rank"])):
                raise CheckpointError(f"a projection is {found} in the optimizer state, and has to be {wanted}.")
        self.adamw.load_state_dict(state_dict["adamw"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._projectors = {}
        for weight, _, group in self._pairs(graded=False):
            if weight in self.state:
                self._projectors[weight] = projector = _new_projector(group)
                projector.ortho_matrix = self.state[weight]["basis"]

    def _pairs(self, *, graded: bool = True) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Each projected weight with its stand-in and its group; those with a gradient, or all."""
        return [
            (weight, stand_in, group)
            for group, inner in zip(self.param_groups, self.adamw.param_groups, strict=True)
            if group["rank"]
            for weight, stand_in in zip(group["params"], inner["params"], strict=True)
            if weight.grad is not None or not graded
        ]

    def _refuse_not_finite(self, pairs: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]) -> None:
        """Singular vectors of what is not finite do not exist, and LAPACK's word for it names no parameter."""
        if self.adamw.check_finite:
            for weight, _, group in pairs:
                if weight.grad is not None and not torch.isfinite(weight.grad).all():
                    at = next(n for n, p in enumerate(group["params"]) if p is weight)
                    name = group["param_names"][at] if "param_names" in group else f"parameter {at} of its group"
                    raise NonFiniteError(f"the gradient of {name} is not finite; no parameter was changed.")

    def _projected(self, weight: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The gradient of a weight at low rank."""
        state = self.state[weight]
        if weight not in self._projectors:
            self._projectors[weight], state["step"] = _new_projector(group), 0
        projector = self._projectors[weight]
        projected: torch.Tensor = projector.project(weight.grad, state["step"])
        state["basis"] = projector.ortho_matrix
        return projected


def _new_projector(group: Mapping[str, Any]) -> Any:
    from galore_torch.galore_projector import GaLoreProjector

    return GaLoreProjector(group["rank"], update_proj_gap=group["update_interval"], scale=group["scale"])


def _stand_in(weight: torch.Tensor, group: Mapping[str, Any]) -> torch.nn.Parameter:
    """Zeros of the shape that the gradient of a weight is projected to."""
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise RequestError(
            f"GaLore projects float32 matrices, and a parameter is {weight.dtype} {tuple(weight.shape)}; put it into a "
            "group of rank 0."
        )
    rows, columns = weight.shape
    rank = min(group["rank"], rows, columns)
    return torch.nn.Parameter(weight.new_zeros((rows, rank) if rows >= columns else (rank, columns)))


def _basis_shape(weight: torch.Tensor, rank: int) -> tuple[int, ...]:
    rows, columns = weight.shape
    rank = min(rank, rows, columns)
    return (rank, columns) if rows >= columns else (rows, rank)


def _check_group(group: Mapping[str, Any]) -> None:
    for key, least in (("rank", 0), ("update_interval", 1)):
        if not isinstance(group[key], int) or group[key] < least:
            raise RequestError(f"{key} is {group[key]!r}; give a whole number of at least {least}.")
    if not group["scale"] > 0:
        raise RequestError(f"scale is {group['scale']!r}; give a number above 0.")
