"""CRC-32 as zlib computes it, by the native library where that has a faster one (csrc/crc32.cpp)."""

from __future__ import annotations

import zlib

import numpy as np

from halfbyte.kernels.cpu import Native, native_library

_SMALL = 4096  # bytes, below which the way to the library takes longer than zlib


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """zlib's CRC-32 of some bytes. The interpreter is let go of meanwhile.

    Args:
        data: contiguous.
        crc: of what came before.
    """
    library = native_library()
    if len(data) < _SMALL or not isinstance(library, Native) or not library.functions["hb_has_crc32"]():
        return zlib.crc32(data, crc)
    view = np.frombuffer(data, np.uint8)
    result: int = library.functions["hb_crc32"](crc, view.ctypes.data, view.nbytes)
    return result
