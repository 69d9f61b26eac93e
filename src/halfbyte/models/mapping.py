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

import torch

from halfbyte.errors import CheckpointError
from halfbyte.kernels.cpu import Native, native_library

# Without it Linux refuses to map privately what is larger than the memory, although no page of it is ever written.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# Place in the native library -> what to say about the loss of a page, by its offset.
_watched: dict[int, Callable[[int], str]] = {}
_told: set[int] = set()
_installed = False


class _Pages(mmap.mmap):
    """A mapping that is forgotten before it is unmapped: a subclass's weak references die first."""


def map_file(descriptor: int, nbytes: int, lost: Callable[[int], str]) -> torch.Tensor:
    """Map a file privately: what is written into the tensor is this process's own.

    Args:
        descriptor: of the open file.
        nbytes: its size, above 0.
        lost: the sentence for a file that became shorter, by the offset of the first page that was missed.

    Returns:
        uint8 [nbytes].
    """
    flags, prot = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    pages = _Pages(descriptor, nbytes, flags=flags, prot=prot)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    library = native_library()
    if isinstance(library, Native) and _install(library):
        place = library.functions["hb_watch_mapping"](tensor.data_ptr(), nbytes)
        if place >= 0:
            _watched[place] = lost
            weakref.finalize(pages, _forget, library, place).atexit = False
    return tensor


def _forget(library: Native, place: int) -> None:
    library.functions["hb_forget_mapping"](place)
    _told.discard(place)
    del _watched[place]


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
    for place, sentence in list(_watched.items()):
        offset = library.functions["hb_lost_of_mapping"](place)
        if offset >= 0 and place not in _told:
            _told.add(place)
            raise CheckpointError(sentence(offset))
