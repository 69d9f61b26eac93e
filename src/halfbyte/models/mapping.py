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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from halfbyte.errors import CheckpointError
from halfbyte.kernels.cpu import Native, native_library

# Without it Linux refuses to map privately what is larger than the memory, although no page of it is ever written.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# What madvise is told; through ctypes, because mmap's own keeps the interpreter's lock while a disk is read.
_RANDOM, _DONTNEED, _HUGE_PAGE = 1, 4, 14
_PAGE_OUT, _POPULATE_READ = 21, 22  # Linux from 5.4 and from 5.14 on
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# Place in the native library -> what to say about the loss of a page, by its offset.
_watched: dict[int, Callable[[int], str]] = {}
_told: set[int] = set()
_installed = False
_living: dict[int, int] = {}  # where mappings begin -> where they end


class _Pages(mmap.mmap):
    """A mapping that is forgotten before it is unmapped.

    mmap's weak references die after that, when another thread's mapping may be at the same place already.
    """

    address, place = 0, -1  # where it begins; where the native library keeps it

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _forget(self.address, self.place)


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
    pages.address = whole.data_ptr()
    _living[pages.address] = pages.address + before + nbytes
    library = native_library()
    if isinstance(library, Native) and _install(library):
        place = library.functions["hb_watch_mapping"](whole.data_ptr(), before + nbytes)
        if place >= 0:
            _watched[place] = lambda page: lost(offset - before + page)
            pages.place = place
    return whole[before:]


def fetch(part: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Bring a part of a mapping into this process in one call: a fault for each 64 KiB takes several times as long."""
    address = part.ctypes.data
    _advise(address, address + len(part), _POPULATE_READ)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor on the CPU lies on pages of a file."""
    address = tensor.data_ptr()
    return any(begin <= address < end for begin, end in list(_living.items()))


def let_go(part: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Give back this process's pages of a part of a mapping: the file's are read again, what was written is lost."""
    begin = -(-part.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE  # a page at the border belongs to a neighbour, too
    _advise(begin, (part.ctypes.data + len(part)) // mmap.PAGESIZE * mmap.PAGESIZE, _DONTNEED)


class Part(NamedTuple):
    """A part of a mapping, by addresses."""

    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.begin


def mapped_parts(tensors: Iterable[torch.Tensor]) -> list[Part]:
    """Where tensors lie in mapped files, in order; what lies elsewhere, or where nothing can be told, is left out.

    Args:
        tensors: contiguous ones.
    """
    parts: list[Part] = []
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if _MADVISE is None or begin == end or not any(b <= begin and end <= e for b, e in list(_living.items())):
            continue
        if parts and begin - parts[-1].end < mmap.PAGESIZE:
            parts[-1] = Part(parts[-1].begin, max(end, parts[-1].end))
        else:
            parts.append(Part(begin, end))
    return parts


def fetch_parts(parts: Iterable[Part]) -> None:
    """Bring parts of mapped files into memory, at the disk's rate, and return when they are there."""
    for begin, end in parts:
        _advise(begin, end, _POPULATE_READ)


def release(parts: Iterable[Part]) -> None:
    """Take parts of mapped files out of memory, except for what another process uses, or somebody has written into.

    Linux does this for files that the process owns or may write; others stay until it needs room.
    """
    for begin, end in parts:
        inside = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # a page at the border belongs to a neighbour, too
        _advise(inside, end // mmap.PAGESIZE * mmap.PAGESIZE, _PAGE_OUT)


def expect_whole(parts: Iterable[Part]) -> None:
    """These parts will be fetched and released as a whole, again and again.

    Huge pages make the system read 2 MiB at a time, whatever the disk is set to, in pages of that size where the file
    system has them: reading and releasing then cost a tenth of the time of the processor.
    """
    for begin, end in parts:
        _advise(begin, end, _HUGE_PAGE)


def expect_rows(parts: Iterable[Part]) -> None:
    """Rows here and there will be read from these parts: what lies around them need not be read with them."""
    for begin, end in parts:
        _advise(begin, end, _RANDOM)


def _advise(begin: int, end: int, advice: int) -> None:
    if _MADVISE is not None and begin < end:
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        _MADVISE(first, end - first, advice)  # a hint; what it misses is met as a fault


def _forget(address: int, place: int) -> None:
    _living.pop(address, None)
    library = native_library()
    if place >= 0 and isinstance(library, Native):
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
    for place, sentence in list(_watched.items()):
        offset = library.functions["hb_lost_of_mapping"](place)
        if offset >= 0 and place not in _told:
            _told.add(place)
            raise CheckpointError(sentence(offset))
