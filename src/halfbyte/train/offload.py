"""Gradient checkpoints in pinned host memory: copied out beside the forward pass, fetched ahead in the backward pass.

With gradient checkpointing a layer keeps its input, and at long rows these inputs are most of what a step holds:
layers x tokens x hidden size. Here they leave the card. Each is copied out on a stream of its own while its layer is
computed, and is let go of when the next layer begins; in the backward pass the input of the layer before is fetched
while a layer is computed again. So the card holds two of them at a time, and the compute stream waits only where
the bus is slower than a layer.

transformers has `offload` among its `activation_checkpointing_kwargs`, and trl has `activation_offloading`. The first
copies on the compute stream, which waits for every byte. The second fetches nothing ahead, also moves what lies outside
of checkpoints, and stops the host at the end of each micro-batch. What is taken from transformers is the way in: the
function that each layer calls to be checkpointed is wrapped, and torch hands over what it saves there.

What users of such offloading report, and what is done about it: pinned memory is a budget of its own, small under WSL
(unslothai/unsloth-zoo#1257), so where it ends, pageable memory is taken, with one warning; allocating pinned memory
takes milliseconds (pytorch/pytorch#186161), so buffers are kept; memory that is released by `record_stream` comes back
late, so tensors are held, and let go of behind an event.

Not yet run on a card. The tests run it on the CPU, with copies that happen as late as the waits allow.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe

FUNCTION = "_gradient_checkpointing_func"  # what a layer of transformers calls to be checkpointed


class Lane(Protocol):
    """Copies between a device and the host, in the order in which they are started, beside what the device computes."""

    def host(self, nbytes: int) -> torch.Tensor:
        """Host memory that copies can go to and come from: uint8 [nbytes]."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy when everything that was computed so far is done; what to `wait` for."""

    def wait(self, copied: Any) -> None:
        """Compute nothing more, where `start` was called from, before that copy is done. The host does not wait."""


class CudaLane:
    """A stream beside the current one.

    Args:
        device: whose memory is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pinned = True

    def host(self, nbytes: int) -> torch.Tensor:
        """Pinned memory, or pageable memory where there is no more of it."""
        if self._pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                warnings.warn(
                    "activation_offloading: the system gives no more pinned memory; the rest goes to pageable memory, "
                    f"which is slower ({str(error).splitlines()[0]})",
                    stacklevel=2,
                )
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Stream]:
        """See `Lane.start`. A copy to or from pageable memory ends before this does."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            on_host = source if source.is_cpu else target
            target.copy_(source, non_blocking=on_host.is_pinned())
        return self._stream.record_event(), computing

    def wait(self, copied: tuple[torch.cuda.Event, torch.cuda.Stream]) -> None:
        """See `Lane.wait`. A graph may be let go of in a thread of autograd's, where another stream is current."""
        event, computing = copied
        computing.wait_event(event)


def cuda_lane(device: torch.device) -> Lane | None:
    """A lane for a CUDA device; None for others, whose tensors stay where they are."""
    return CudaLane(device) if device.type == "cuda" else None


class Offload:
    """The hooks that move checkpoints, for one model.

    Args:
        lane_of: gives a device its lane, or None where nothing is to be moved.
    """

    def __init__(self, lane_of: Callable[[torch.device], Lane | None] = cuda_lane) -> None:
        self._lane_of = lane_of
        self._pools: dict[torch.device, _Pool | None] = {}
        self._last: weakref.ref[_Checkpoint] | None = None

    def attach(self, model: nn.Module) -> None:
        """Let the layers of `model`, whose gradient checkpointing is on, keep their checkpoints on the host.

        Raises:
            RequestError: it has no layer that is checkpointed by transformers' function.
        """
        checkpointed = [module for module in model.modules() if FUNCTION in vars(module)]
        if not checkpointed:
            raise RequestError(
                f"activation_offloading is true, but {type(model).__name__} has no layers that transformers "
                "checkpoints; leave it out."
            )
        for module in checkpointed:
            setattr(module, FUNCTION, self._offloaded(getattr(module, FUNCTION)))

    def _offloaded(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Of what is saved in here only the layer's inputs arrive: inside of it the checkpoint's own hooks stand.
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpoint(*args, **kwargs)

        return call

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Checkpoint:
        # Masks and positions need no gradient; layers share them, and each would copy them. torch 2.6 saves an empty
        # tensor beside each layer's inputs.
        whole = tensor.is_contiguous() and tensor.numel() > 0
        moves = tensor.requires_grad and whole and type(tensor) is torch.Tensor
        pool = self._pool(tensor.device) if moves else None
        if pool is None:
            return tensor
        checkpoint = _Checkpoint(pool, tensor.detach(), self._last)
        self._last = weakref.ref(checkpoint)
        return checkpoint

    def _unpack(self, saved: torch.Tensor | _Checkpoint) -> torch.Tensor:
        return saved.restored() if isinstance(saved, _Checkpoint) else saved

    def _pool(self, device: torch.device) -> _Pool | None:
        if device not in self._pools:
            lane = self._lane_of(device)
            self._pools[device] = None if lane is None else _Pool(lane)
        return self._pools[device]


class _Pool:
    """Host buffers of a lane that are not in use; the last one given back is the next one taken."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes. One that is too small is dropped: longer rows make all of them grow."""
        while self._free:
            buffer = self._free.pop()
            if buffer.numel() >= nbytes:
                return buffer
        return self.lane.host(nbytes)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Copies out of it may be under way: the lane's order keeps them before the next one into it."""
        self._free.append(buffer)


class _Checkpoint:
    """A layer's input on its way to the host, there, or on its way back. It lives as long as autograd keeps it.

    Args:
        pool: where its host memory comes from and goes back to.
        tensor: the input.
        before: the checkpoint that was made before this one, which the backward pass needs after it.
    """

    def __init__(self, pool: _Pool, tensor: torch.Tensor, before: weakref.ref[_Checkpoint] | None) -> None:
        self._pool, self._before = pool, before
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        nbytes = math.prod(tensor.shape) * tensor.element_size()
        self._buffer = pool.take(nbytes)
        self._host = self._buffer[:nbytes].view(tensor.dtype).view(tensor.shape)
        self._tensor: torch.Tensor | None = tensor  # while it is being copied, either way
        self._copied = pool.lane.start(self._host, tensor)
        previous = self._previous()
        if previous is not None:
            previous.let_go()

    def __del__(self) -> None:
        self.let_go()
        self._pool.give_back(self._buffer)

    def _previous(self) -> _Checkpoint | None:
        return None if self._before is None else self._before()

    def let_go(self) -> torch.Tensor | None:
        """Hand over the tensor that a copy is reading or writing, if there is one; what uses it comes after the copy.

        Without the wait its memory could be given to somebody else while the copy goes on.
        """
        tensor, self._tensor = self._tensor, None
        if tensor is not None:
            self._pool.lane.wait(self._copied)
        return tensor

    def fetch(self) -> None:
        """Begin to copy it back, unless it is on the device still."""
        if self._tensor is None:
            # Of the compute stream's memory, and the copy begins after what that stream has done with it before.
            self._tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._pool.lane.start(self._tensor, self._host)

    def restored(self) -> torch.Tensor:
        """The input, on its device; from here on the checkpoint that is needed next is on its way."""
        self.fetch()
        tensor = self.let_go()
        assert tensor is not None
        previous = self._previous()
        if previous is not None:
            previous.fetch()
        return tensor


def check_offloading(recipe: Recipe) -> None:
    """There is a device to take checkpoints from.

    Raises:
        RequestError: there is none.
    """
    if recipe.activation_offloading and not torch.cuda.is_available():
        raise RequestError(
            "activation_offloading is true, which needs a CUDA device, and there is none: checkpoints are in host "
            "memory already; leave it out."
        )
