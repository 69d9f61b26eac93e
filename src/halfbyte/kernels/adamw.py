"""Which AdamW step runs: the native one on the CPU, the reference where there is none.

Like the ops of `registry`, by the same environment variable; a step is no torch op, since it changes lists of tensors
in place and nothing traces it.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte import env
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.adamw import NativeBatch
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import Batch, Slot


def make_batch(slots: Sequence[Slot]) -> Batch:
    """Slots of one device as one call.

    Raises:
        ShapeError: a state that does not belong to its parameter.
    """
    native = cpu.native_library()
    on_cpu = bool(slots) and slots[0].param.device.type == "cpu"
    if on_cpu and isinstance(native, cpu.Native) and env.kernels() != "reference":
        return NativeBatch(native, slots)
    return ReferenceBatch(slots)
