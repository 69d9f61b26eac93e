"""A file mapped as a tensor, whose shrinking is an error and not the end of the process.

The system answers a read from a page that the file no longer has with SIGBUS, which ends the process. Where the native
library is there (csrc/mapped.cpp), the fault puts empty pages in place and is remembered; the main thread then raises
`CheckpointError` with the name of the first section that is gone, before it runs another line of Python. Whatever
computed meanwhile has seen zeros, and its result does not get past that error.

Three limits. Python runs signal handlers in its main thread only: another thread learns of it when the main one does
something about it. Where the first mapping is made outside the main thread, or the program handles SIGBUS itself,
nothing is taken over. And without the native library there is no guard: the process ends, as it would have.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from halfbyte.errors import CheckpointError
from halfbyte.kernels.cpu import Native, native_library

# Without it Linux refuses to map privately what is larger than the memory, although no page of it is ever written.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# Linux from 5.14 on; through ctypes, because mmap's own madvise keeps the interpreter's lock while a disk is read.
_POPULATE_READ, _DONTNEED = 22, 4
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# Place in the native library -> the addresses, and what to say about the loss of a page, by its offset.
_watched: dict[int, tuple[range, Callable[[int], str]]] = {}
_told: set[int] = set()
_installed = False


class _Pages(mmap.mmap):
    """A mapping that is forgotten before it is unmapped: a subclass's weak references die first."""


def is_guarded() -> bool:
    """Whether a file that is mapped from here on may shrink without ending the process."""
    library = native_library()
    return isinstance(library, Native) and _install(library)


def map_file(descriptor: int, nbytes: int, lost: Callable[[int], str], offset: int = 0) -> torch.Tensor:
    """Map a file, or a part of it, privately: what is written into the tensor is this process's own.

    Args:
        descriptor: of the open file.
        nbytes: of the part, above 0.
        lost: the sentence for a file that became shorter, by the offset in it of the first page that was missed.
        offset: where the part begins.

    Returns:
        uint8 [nbytes].
    """
    flags, prot = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    before = offset % mmap.ALLOCATIONGRANULARITY
    pages = _Pages(descriptor, before + nbytes, flags=flags, prot=prot, offset=offset - before)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    library = native_library()
    if isinstance(library, Native) and _install(library):
        place = library.functions["hb_watch_mapping"](whole.data_ptr(), before + nbytes)
        if place >= 0:
            addresses = range(whole.data_ptr(), whole.data_ptr() + before + nbytes)
            _watched[place] = addresses, lambda page: lost(offset - before + page)
            weakref.finalize(pages, _forget, library, place).atexit = False
    return whole[before:]


def fetch(part: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Bring a part of a mapping into this process in one call: a fault for each 64 KiB takes several times as long."""
    if _MADVISE is not None and len(part):
        address = part.ctypes.data
        before = address % mmap.PAGESIZE
        _MADVISE(address - before, before + len(part), _POPULATE_READ)  # a hint; what it misses is met as a fault


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor on the CPU lies on pages of a file whose shrinking is watched for."""
    address = tensor.data_ptr()
    return any(address in addresses for addresses, _ in list(_watched.values()))


def release(part: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Give back the pages that lie wholly in a part of a mapping; what was not written into it is still in the file."""
    if _MADVISE is not None:
        begin = -(-part.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        nbytes = (part.ctypes.data + len(part)) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if nbytes > 0:
            _MADVISE(begin, nbytes, _DONTNEED)


def _forget(library: Native, place: int) -> None:
    # The library may give the place to another thread's mapping as soon as it has it back.
    del _watched[place]
    _told.discard(place)
    library.functions["hb_forget_mapping"](place)


def _install(library: Native) -> bool:
    """Take SIGBUS over, once; whether it is ours."""
    global _installed
    if _installed or not hasattr(signal, "SIGBUS"):
        return _installed
    ours = threading.current_thread() is threading.main_thread()
    if not ours or callable(signal.getsignal(signal.SIGBUS)):
        return False
    tell = ctypes.cast(ctypes.pythonapi.PyErr_SetInterruptEx, ctypes.c_void_p)
    watch = library.functions["hb_watch_mappings"]
    # The first call remembers who handled SIGBUS before. Python then puts its own handler there, over which the second
    # one puts ours again: the library meets the fault, and Python's function runs when the library tells it to.
    if watch(tell):
        return False
    signal.signal(signal.SIGBUS, lambda number, frame: _raise(library))
    _installed = not watch(tell)
    return _installed


def _raise(library: Native) -> Any:
    for place, (_, sentence) in list(_watched.items()):
        offset = library.functions["hb_lost_of_mapping"](place)
        if offset >= 0 and place not in _told:
            _told.add(place)
            raise CheckpointError(sentence(offset))
