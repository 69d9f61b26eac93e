"""Which AdamW step runs: the native one on the CPU, Triton's on CUDA, the reference where there is neither.

Like the ops of `registry`, by the same environment variable; a step is no torch op, since it changes lists of tensors
in place and nothing traces it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from halfbyte import env
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.adamw import NativeBatch
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import Batch, DeviceBatch, Slot
from halfbyte.kernels.tuning import too_old


def make_batch(slots: Sequence[Slot]) -> Batch:
    """Slots of one device as one call.

    Raises:
        ShapeError: a state that does not belong to its parameter.
    """
    device = slots[0].param.device if slots else torch.device("cpu")
    if env.kernels() == "reference":
        return ReferenceBatch(slots)
    native = cpu.native_library()
    if device.type == "cpu" and isinstance(native, cpu.Native):
        return NativeBatch(native, slots)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None and not too_old(device):
        return make_device_batch(slots)
    return ReferenceBatch(slots)


def make_device_batch(slots: Sequence[Slot]) -> DeviceBatch:
    """The same for steps in a CUDA graph, on a device that `why_not_captured` has nothing against."""
    from halfbyte.kernels.triton.adamw import TritonBatch  # importing triton takes a second

    return TritonBatch(slots)


def why_not_captured(device: torch.device) -> str:
    """Why a CUDA graph cannot hold a step of parameters on this device; "": it can."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and this is {device}"
    if env.kernels() == "reference":
        return "HALFBYTE_KERNELS=reference asks for torch's operations, which take numbers from the host"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return too_old(device)
