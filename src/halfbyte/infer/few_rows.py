"""What takes the steps that answers are made of, some rows of any sequences: one choice, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from halfbyte import env
from halfbyte.kernels import Choice, cpu
from halfbyte.kernels.cpu import Native
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.decoder import Cache, Enter, Network
from halfbyte.kernels.registry import REFERENCE_ASKED_FOR, Availability, cpu_available, triton_available
from halfbyte.kernels.tuning import too_old

if TYPE_CHECKING:
    from halfbyte.kernels.triton.decoder import TritonDecoder


def few_rows_decoder(
    network: Network, cache: Cache, dtype: torch.dtype, enter: Enter | None
) -> tuple[NativeDecoder | TritonDecoder | None, str]:
    """The decoder for steps of few rows, and what it is, in a sentence; None: torch operations take them as well.

    Args:
        network: on the device that answers.
        cache: beside it.
        dtype: of activations.
        enter: see `Enter`; on a card all weights are there, and it is not called.
    """
    on_cpu = network.device.type == "cpu"
    state = _state(cpu_available if on_cpu else triton_available)
    if not state.possible:
        return None, f"torch operations, because {state.reason}" + (f"; {state.remedy}" if state.remedy else "")
    if not on_cpu:
        return _on_card(network, cache, dtype)
    native = cpu.native_library()
    assert isinstance(native, Native)
    return NativeDecoder(native, network, cache, dtype, enter), f"the native decoder, {native.isa}"


def _on_card(network: Network, cache: Cache, dtype: torch.dtype) -> tuple[TritonDecoder | None, str]:
    why_not = too_old(network.device)
    if why_not:
        return None, f"torch operations, because {why_not}"
    from halfbyte.kernels.triton.decoder import TritonDecoder
    from halfbyte.kernels.triton.weights import takes

    if not takes(dtype, network.device):
        return None, f"torch operations, because this Triton has no {dtype} for the card; update it, or take float16"
    name = torch.cuda.get_device_name(network.device)
    return TritonDecoder(network, cache, dtype), f"a CUDA graph of Triton's kernels, {name}"


def chosen_decoders() -> tuple[Choice, ...]:
    """What takes such steps on a CPU and on a card."""
    states = (("cpu", "native", _state(cpu_available)), ("cuda", "triton", _state(triton_available)))
    return tuple(
        Choice("decoding", device, name if state.possible else "torch", state.reason, state.remedy)
        for device, name, state in states
    )


def _state(available: Callable[[], Availability]) -> Availability:
    return REFERENCE_ASKED_FOR if env.kernels() == "reference" else available()
