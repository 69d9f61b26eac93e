"""What takes the steps that answers are made of, some rows of any sequences: one choice, with its reason."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.decoder import Cache, Enter, Network

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
    if network.device.type != "cpu":
        return _on_card(network, cache, dtype)
    native = cpu.native_library()
    if isinstance(native, cpu.Missing):
        return None, f"torch operations, because {native.reason}; {native.remedy}"
    return NativeDecoder(native, network, cache, dtype, enter), f"the native decoder, {native.isa}"


def _on_card(network: Network, cache: Cache, dtype: torch.dtype) -> tuple[TritonDecoder | None, str]:
    where = f"torch operations on {network.device}"
    if importlib.util.find_spec("triton") is None:
        return None, f"{where}, because triton is not installed; pip install triton"
    from halfbyte.kernels.triton.decoder import TritonDecoder
    from halfbyte.kernels.triton.weights import takes

    if not takes(dtype, network.device):
        return None, f"{where}, because this Triton has no {dtype} for the card; update triton, or give dtype float16"
    name = torch.cuda.get_device_name(network.device)
    return TritonDecoder(network, cache, dtype), f"a CUDA graph of Triton's kernels, {name}"
