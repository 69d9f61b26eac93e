"""What an optimizer step is told: the contract between `halfbyte.optim` and the kernels that step.

A step works on *slots*. A slot is a parameter (or a range of one) with its state; many of them make one call, because
an adapter has hundreds of small matrices and a call for each would cost more than the work. Numbers that slots share
(learning rate, betas, corrections for the step) are `Options`, computed in float64 and rounded to float32 once.

bfloat16 parameters without a float32 master are rounded stochastically: up with the probability of the fraction that
is cut off, so that updates far below bfloat16's resolution of 2**-8 are right on average. The random number of element
i is a hash of i and of a key that belongs to (seed, step, parameter); it depends on no order and no thread count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from halfbyte.errors import RequestError

BLOCK_8BIT = 256  # elements that share a scale, as in bitsandbytes' files
BLOCK_4BIT = 128  # arXiv 2309.01507, "B128"
KINDS = ("float32", "8bit", "4bit")  # numbered as enum hb_state


class Options(NamedTuple):
    """Numbers of one AdamW step, each a float32: the fields of `hb_adamw_options` in csrc/halfbyte.h."""

    grad_scale: float
    beta1: float
    weight1: float
    beta2: float
    weight2: float
    eps: float
    correction2: float
    inverse2: float
    step_size: float
    decay: float


@dataclass(slots=True, eq=False)
class Slot:
    """Elements `[first, first + count)` of a parameter, flattened, and their state. Everything is on one device.

    Attributes:
        param: float32 or bfloat16, any shape and strides; the whole parameter.
        first: a multiple of the state's block.
        count: elements.
        kind: "float32", "8bit" or "4bit".
        moment1: first moments: float32 [count], uint8 [count], or packed uint8 [ceil(count / 2)].
        moment2: second moments, likewise.
        scale1: float32 [blocks], or None for float32 states.
        scale2: float32 [blocks], or [rows] where `columns` is given.
        columns: float32 [columns]: the second moment is scaled by the smaller of its row's and its column's scale.
        master: float32 [count], what a bfloat16 parameter is rounded from, or None.
        number: the parameter's position in the optimizer, part of the key of random numbers.
    """

    param: torch.Tensor
    first: int
    count: int
    kind: str
    moment1: torch.Tensor
    moment2: torch.Tensor
    scale1: torch.Tensor | None = None
    scale2: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    master: torch.Tensor | None = None
    number: int = 0


class Batch(Protocol):
    """Slots that are stepped in one call. Gradients come in the order of the slots, None where there is none."""

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """Each slot's sum of squared gradients in float64, 0 where there is no gradient; not finite where it is not."""

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """Update parameters and states.

        Args:
            grads: float32 or bfloat16, of the whole parameter's shape.
            options: the different numbers of this step.
            which: each slot's position in `options`.
            keys: uint32 [slots, 2].
        """


class DeviceBatch(Batch, Protocol):
    """Slots that can also be stepped with all numbers on their device, so that a CUDA graph may hold the step."""

    def squares(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What `norms` gives, as a tensor on the device: float64 [slots]."""

    def step_on_device(
        self,
        grads: Sequence[torch.Tensor | None],
        options: torch.Tensor,
        weights1: Sequence[float],
        keys: torch.Tensor,
    ) -> None:
        """Update parameters and states, or change nothing where the gradients' scale is NaN.

        Args:
            grads: as for `step`.
            options: float32 [slots, 10], from `device_options`.
            weights1: each slot's `Options.weight1`, which a kernel is chosen by.
            keys: int32 [slots, 2], from `device_keys`.

        Raises:
            RequestError: what a capture needs to find there is not: it takes a step outside of it first.
        """


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on this device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Something is about to be made that lasts: not in a CUDA graph, which would make it again at each replay.

    Raises:
        RequestError: one is being captured.
    """
    if is_capturing(device):
        raise RequestError(
            "a CUDA graph is to hold a step of AdamW that has states or tables to make; step once before the capture, "
            "with gradients of the same parameters and dtypes."
        )


def make_options(group: Mapping[str, Any], step: int, grad_scale: float) -> Options:
    """The numbers of step `step` (the first is 1) of a parameter group."""
    return _options(group, float(group["lr"]), step, math.sqrt, grad_scale)


def _options(group: Mapping[str, Any], lr: Any, step: Any, sqrt: Callable[[Any], Any], grad_scale: Any) -> Options:
    """Of numbers of the host, or of tensors."""
    beta1, beta2 = group["betas"]
    correction2 = sqrt(1 - beta2**step)
    return Options(
        grad_scale=grad_scale,
        beta1=beta1,
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        eps=group["eps"],
        correction2=correction2,
        inverse2=1 / correction2,
        step_size=-lr / (1 - beta1**step),
        decay=1 - lr * group["weight_decay"],
    )


def device_options(group: Mapping[str, Any], steps: torch.Tensor, grad_scale: torch.Tensor) -> torch.Tensor:
    """`make_options` of several parameters of a group, computed where their step numbers are.

    Args:
        group: a learning rate that is a tensor on that device is read there, other numbers become the graph's.
        steps: float64 [n].
        grad_scale: float64 [].

    Returns:
        float32 [n, 10]. Powers may differ from the host's in the last place of a float64.
    """
    lr = group["lr"]
    lr = lr.double() if isinstance(lr, torch.Tensor) and lr.device == steps.device else float(lr)
    options: tuple[Any, ...] = _options(group, lr, steps, torch.sqrt, grad_scale)
    columns = [o.expand_as(steps) if isinstance(o, torch.Tensor) else torch.full_like(steps, o) for o in options]
    return torch.stack(columns, 1).float()


def random_keys(seed: int, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The key of each parameter in a step: splitmix64 of seed, step and number.

    Args:
        seed: any integer.
        steps: integer [n].
        numbers: integer [n], the parameters' positions.

    Returns:
        uint32 [n, 2].
    """
    key = np.full(len(steps), seed & (2**64 - 1), dtype=np.uint64)
    for part in (steps, numbers):
        key = _splitmix(key ^ _splitmix(part.astype(np.uint64)))
    return key.view(np.uint32).reshape(-1, 2)


def device_keys(seed: int, steps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """`random_keys` computed on a device.

    Args:
        seed: any integer.
        steps: [n], whole numbers of any dtype.
        numbers: int64 [n].

    Returns:
        int32 [n, 2], the same bits.
    """
    key = torch.full_like(numbers, _signed(seed))
    for part in (steps.long(), numbers):
        key = _splitmix_int64(key ^ _splitmix_int64(part))
    return key.view(torch.int32).view(-1, 2)


def _signed(number: int) -> int:
    """The int64 of a number's lowest 64 bits."""
    return (number & (2**64 - 1)) - ((number & 2**63) << 1)


def _splitmix_int64(x: torch.Tensor) -> torch.Tensor:
    """`_splitmix` without unsigned numbers: the shift's copies of the sign are masked out."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & (2**33 - 1))


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around, as intended
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
