"""States that lie outside memory: in a file on any machine, or in the host's memory beside a GPU.

Paging is explicit. States lie somewhere else, a step brings them in piece by piece within a budget of bytes, and what
it has finished with goes out again; nothing relies on managed memory or on the system guessing right.

**File.** A temporary file without a name is mapped into the process: it vanishes with the process, however that ends.
Its space is reserved before it is mapped, so a disk that is full is an error when the optimizer is made and not a
fatal signal in the middle of a step. After each piece of work the process gives the pages back; they stay in the
system's cache as long as nobody needs the memory, so paging costs little until memory is short. A folder in a
memory-backed file system (tmpfs) would defeat the purpose: choose one on a disk.

**Host.** States lie in pinned host memory. While one piece is stepped on the GPU, a stream of its own brings the next
one in and takes the last one back.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.errors import OutputError, RequestError
from halfbyte.kernels.adamw import make_batch
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import Options, Slot

_STATE_FIELDS = ("moment1", "moment2", "scale1", "scale2", "columns", "master")

# What a file grows by: the mapping's price is paid once for many small states.
_SEGMENT = 1 << 26
_ALIGNMENT = 64


class FileArena:
    """Tensors in a temporary file.

    Args:
        folder: where the file lies; None: the system's folder for temporary files.

    Raises:
        RequestError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        if not self.folder.is_dir():
            raise RequestError(f"page_dir {str(self.folder)!r} is no folder; name one that lies on a disk.")
        self._segments: list[tuple[mmap.mmap, torch.Tensor]] = []
        self._used = 0

    def reserve(self, size: int) -> None:
        """Make sure that the next `size` bytes lie in one segment.

        Raises:
            OutputError: there is not enough space on the disk.
        """
        if self._segments and self._used + size <= self._segments[-1][1].numel():
            return
        length = -(-max(size, _SEGMENT) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="halfbyte-optimizer-") as file:
                os.posix_fallocate(file.fileno(), 0, length)
                mapping = mmap.mmap(file.fileno(), length)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
            raise OutputError(
                f"{length / 2**20:,.0f} MiB of optimizer state cannot be paged to {self.folder}: {why}; "
                "free some space, or name another folder with page_dir."
            ) from error
        self._segments.append((mapping, torch.frombuffer(mapping, dtype=torch.uint8)))
        self._used = 0

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Zeros in the file; `device` is the CPU."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        self.reserve(size)
        piece = self._segments[-1][1][self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Give the pages back that this process has touched. Their contents stay."""
        for mapping, _ in self._segments:
            mapping.madvise(mmap.MADV_DONTNEED)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Ask the system to read these from the disk before they are used."""
        for mapping, tensor in self._segments:
            begin = tensor.data_ptr()
            inside = [t for t in tensors if t.numel() and 0 <= t.data_ptr() - begin < tensor.numel()]
            if inside:
                first = min(t.data_ptr() for t in inside) - begin
                last = max(t.data_ptr() + t.nbytes for t in inside) - begin
                first -= first % mmap.PAGESIZE
                mapping.madvise(mmap.MADV_WILLNEED, first, last - first)


class HostPager:
    """States in pinned host memory, brought to the GPU for their turn by a stream of their own."""

    # One piece is stepped while the next is on its way in and the last on its way out.
    PIECES_AT_ONCE = 3

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Zeros in pinned host memory, whatever `device` is."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def batch(self, slots: Sequence[Slot]) -> HostBatch:
        """Slots of one device whose states lie on the host."""
        device = slots[0].param.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return HostBatch(slots, self._streams[device])

    def finish(self) -> None:
        """Wait until every state is back on the host, where it may be read."""
        for stream in self._streams.values():
            stream.synchronize()


class HostBatch:
    """A `halfbyte.kernels.slots.Batch` whose states are on the GPU only during their turn."""

    def __init__(self, slots: Sequence[Slot], stream: torch.cuda.Stream) -> None:
        self.slots, self._stream = slots, stream
        self._resident: list[Slot] | None = None

    def fetch(self) -> None:
        """Begin to bring the states in."""
        with torch.cuda.stream(self._stream):
            self._resident = [self._moved(slot) for slot in self.slots]

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """See `Batch.norms`; needs no state."""
        return ReferenceBatch(self.slots).norms(grads)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """See `Batch.step`."""
        if self._resident is None:
            self.fetch()
        resident, self._resident = self._resident, None
        assert resident is not None
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        make_batch(resident).step(grads, options, which, keys)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for slot, moved in zip(self.slots, resident, strict=True):
                for name in _STATE_FIELDS:
                    if (tensor := getattr(moved, name)) is not None:
                        getattr(slot, name).copy_(tensor, non_blocking=True)
                        # The allocator may lend the memory out again only after both streams have read it.
                        tensor.record_stream(current)
                        tensor.record_stream(self._stream)

    def _moved(self, slot: Slot) -> Slot:
        device = slot.param.device
        tensors = {name: getattr(slot, name) for name in _STATE_FIELDS}
        moved: dict[str, Any] = {
            name: None if t is None else t.to(device, non_blocking=True) for name, t in tensors.items()
        }
        return replace(slot, **moved)
