"""The stream of a model's parameters into an archive: read, quantized and written at the same time.

transformers' loader reads one tensor after the other in the main thread. What it reads is cut into pieces, which a few
threads quantize, each piece by one thread while it lies in that core's cache; one more thread makes the second level of
scales and writes, in the order of reading. The threads are ours and not OpenMP's: those wait for each other by
spinning, which took a third of the processor's time as soon as another thread had work too.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from halfbyte.errors import FormatError
from halfbyte.formats.packing import packed_size
from halfbyte.models.archive_writer import ArchiveWriter
from halfbyte.models.mapping import fetch, is_mapped, let_go
from halfbyte.models.quantizer import Arrival, Sink, check_finite
from halfbyte.nn.replace import as_stored
from halfbyte.tensor import QuantizedTensor, assemble
from halfbyte.threads import one_thread

# Elements quantized at once: a multiple of every block size.
_PIECE = 1 << 22
# Bytes that parameters underway may hold; one alone may hold more.
_UNDERWAY = 1 << 25
# Bytes held between two times that freed memory is given back.
_TRIM_EVERY = 1 << 24


@dataclass(frozen=True)
class _Underway:
    """A parameter that is being quantized or written.

    Attributes:
        arrival: the parameter. It stays here until the main thread has seen that it is written: when a file shrinks
            while it is mapped, that thread is told, and only of mappings that are still there (see
            halfbyte.models.mapping).
        memory: bytes held for it; what lies on pages of a file is let go piece by piece.
        written: its end.
    """

    arrival: Arrival
    memory: int
    written: Future[None]


class QuantizingStream:
    """A sink that quantizes and writes each parameter while the next ones are read.

    Args:
        archive: to write into; what it has already is left as it is.
    """

    def __init__(self, archive: ArchiveWriter) -> None:
        self._archive = archive
        self._workers = ThreadPoolExecutor(torch.get_num_threads(), "quantize")
        self._writer = ThreadPoolExecutor(1, "write")
        self._underway: deque[_Underway] = deque()
        self._since_trim = 0

    def __enter__(self) -> Sink:
        return self._take

    def __exit__(self, *error: object) -> None:
        # The file may be closed only after the last write. What went wrong there counts unless something did here.
        failed = error[0] is not None
        try:
            while self._underway and not failed:
                self._finish_first()
        except BaseException:
            failed = True
            raise
        finally:
            self._workers.shutdown(cancel_futures=failed)
            self._writer.shutdown(cancel_futures=failed)

    def _take(self, model: nn.Module, arrival: Arrival) -> nn.Parameter:
        if self._archive.has(arrival.name):
            return nn.Parameter(self._archive.placeholder(arrival.name), requires_grad=False)
        placeholder, mapped = arrival.placeholder(), is_mapped(arrival.tensor)
        memory = 0 if mapped and arrival.kind is None else placeholder.nbytes
        if not mapped and arrival.kind is not None:
            memory += arrival.tensor.nbytes
        while self._underway and sum(other.memory for other in self._underway) + memory > _UNDERWAY:
            self._finish_first()
        made = self._begin(arrival)
        # Some checkpoints hold both copies of a tied head; without their bytes transformers cannot see that.
        partners = _partners(model, arrival.name)
        done = _let_go if mapped else None
        written = self._writer.submit(lambda: self._archive.add(arrival.name, made(), partners, done))
        self._underway.append(_Underway(arrival, memory, written))
        self._since_trim += memory
        if self._since_trim > _TRIM_EVERY:
            trim()
            self._since_trim = 0
        return placeholder

    def _begin(self, arrival: Arrival) -> Callable[[], torch.Tensor]:
        """Begin to quantize; the call that waits for it and gives what is to be written."""
        if arrival.kind is None:
            return self._keep(arrival)
        dense, spec = as_stored(arrival.tensor.detach(), arrival.kind).contiguous(), arrival.spec
        shape, dtype, flat, mapped = dense.shape, dense.dtype, dense.view(-1), is_mapped(dense)
        codes = torch.empty(packed_size(flat.numel(), spec.codebook.bits), dtype=torch.uint8)
        scales = torch.empty(-(-flat.numel() // spec.block_size), dtype=torch.float32)

        def quantize(start: int) -> None:
            piece = flat[start : start + _PIECE]
            pages = piece.view(torch.uint8).numpy()
            fetch(pages)
            with one_thread():
                found = torch.ops.halfbyte.quantize(piece, spec.format, spec.block_size)
            if mapped:
                let_go(pages)
            places = start * spec.codebook.bits // 8, start // spec.block_size
            for whole, place, part in zip((codes, scales), places, found, strict=True):
                # torch would copy with all threads.
                np.copyto(whole.numpy()[place : place + len(part)], part.numpy())

        pieces = [self._workers.submit(quantize, start) for start in range(0, flat.numel(), _PIECE)]

        def finish() -> QuantizedTensor:
            for piece in pieces:
                piece.result()
            try:
                with one_thread():
                    return assemble(codes, scales, spec, shape, dtype)
            except FormatError as error:
                raise FormatError(f"{arrival.name}: {error}") from None

        return finish

    def _keep(self, arrival: Arrival) -> Callable[[], torch.Tensor]:
        """Begin to look at a tensor that stays as it is."""
        tensor = arrival.tensor.detach()
        flat, mapped = tensor.reshape(-1), is_mapped(tensor)

        def look(start: int) -> None:
            piece = flat[start : start + _PIECE]
            check_finite(arrival.name, piece)
            if mapped:
                let_go(piece.view(torch.uint8).numpy())

        looked = [self._workers.submit(look, start) for start in range(0, flat.numel(), _PIECE)]

        def finish() -> torch.Tensor:
            for piece in looked:
                piece.result()
            return tensor

        return finish

    def _finish_first(self) -> None:
        self._underway[0].written.result()
        self._underway.popleft()


def _let_go(piece: memoryview) -> None:
    let_go(np.frombuffer(piece, np.uint8))


def trim() -> None:
    """Let the C library give freed memory back: glibc keeps up to 32 MB of each freed tensor's size for later.

    Without, quantizing a 435 M Llama peaked at 166 MB over the idle process; the largest tensor has 33.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _partners(model: Any, name: str) -> list[str]:
    """The names that the model's config ties to `name`."""
    tied: dict[str, str] = model.all_tied_weights_keys
    pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
    return [other for one, other in pairs if one == name]
