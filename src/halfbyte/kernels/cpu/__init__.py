"""Native kernels for the CPU: AMX, AVX512-BF16, AVX512, AVX2, NEON or plain C++, whichever this machine has (csrc/)."""

from __future__ import annotations

from functools import cache

from halfbyte.kernels.cpu.library import Missing, Native, load
from halfbyte.kernels.cpu.ops import Ops, packed_weight


@cache
def native_library() -> Native | Missing:
    """The native library, loaded once, or why there is none."""
    return load()


@cache
def native_ops() -> Ops:
    """The ops on the loaded library; to be asked for only when there is one."""
    native = native_library()
    assert isinstance(native, Native)
    return Ops(native)


__all__ = ["Missing", "Native", "Ops", "native_library", "native_ops", "packed_weight"]
