"""What takes the steps that answers are made of, some rows of any sequences: one choice, with its reason."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from halfbyte import env
from halfbyte.kernels import Choice, cpu
from halfbyte.kernels.cpu import Native
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.decoder import Cache, Enter, Network
from halfbyte.kernels.registry import Availability
from halfbyte.kernels.tuning import too_old

if TYPE_CHECKING:
    from halfbyte.kernels.triton.decoder import TritonDecoder

_ASKED_FOR = Availability(False, "HALFBYTE_KERNELS=reference asks for it")


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
    state = native_available() if on_cpu else triton_available()
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
    states = (("cpu", "native", native_available()), ("cuda", "triton", triton_available()))
    return tuple(
        Choice("decoding", device, name if state.possible else "torch", state.reason, state.remedy)
        for device, name, state in states
    )


def native_available() -> Availability:
    """Whether the native library can take them."""
    if env.kernels() == "reference":
        return _ASKED_FOR
    library = cpu.native_library()
    if isinstance(library, cpu.Missing):
        return Availability(False, library.reason, library.remedy)
    return Availability(True, f"one call a step, {library.isa}")


def triton_available() -> Availability:
    """Whether Triton's kernels can take them on a card of this machine, if it has one."""
    if env.kernels() == "reference":
        return _ASKED_FOR
    if not torch.backends.cuda.is_built():
        return Availability(False, "this torch is built without CUDA", "on a machine with a card, install one with it")
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed", "pip install triton")
    return Availability(True, "a CUDA graph a step")
