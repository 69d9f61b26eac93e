"""Writing an archive: one tensor at a time, whole or not at all, and continued after a kill.

The archive grows in a file beside its place, `.NAME.partial`, whose header stays zero until everything else is on disk;
then the header is written and the file renamed. Until that moment there is nothing that any reader takes for an
archive, and an older one at the same place is untouched.

Beside it a journal, `.NAME.journal`, gets a line for each finished tensor. After a kill the same request finds both,
checks every finished section against its checksum, keeps those up to the first that fails and goes on from there; a
different request starts anew. A lock on the partial file keeps two processes apart.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError, OutputError
from halfbyte.models import archive_codec
from halfbyte.models.archive_format import (
    CHUNK,
    HEADER_SIZE,
    MAGIC,
    SUFFIX,
    Directory,
    Entry,
    Section,
    aligned,
    decode_entry,
    encode_directory,
    encode_entry,
    encode_header,
)
from halfbyte.models.checksum import crc32
from halfbyte.models.saving import as_output_error, check_parent, make_parents, sync, umask
from halfbyte.tensor import QuantizedTensor

# What is compressed: codes, and scales of 8 bits or fewer. Everything else (float32 scales, dense weights) is noise.
_COMPRESSED = ("codes", "scales")
_READ = 1 << 22
_PIECE = 1 << 22  # bytes of a section that are checked and then written
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class ArchiveWriter:
    """An archive in the making. Use `new_archive`, which makes sure that it is finished or cleaned up.

    Attributes:
        directory: what has been written so far.
        resumed: tensors that were kept from a run that was killed.
        written: bytes written by this run.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], compress: bool) -> None:
        self.path = path
        self.partial, self.journal = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.journal")
        self._compress = compress
        self.directory = Directory(f"halfbyte {version('halfbyte')}")
        asked = {key: source_state(value) if isinstance(value, Path) else value for key, value in request.items()}
        asked = {"generator": self.directory.generator, "compress": compress, "request": asked}
        self._request = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self.written = 0
        self._aside = ThreadPoolExecutor(1)  # hands over to the disk, which may keep whoever does that waiting
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            self._lock()
            try:
                self._end = self._resume()
            except OSError:  # the disk is full: nothing of this run is to stay behind
                self.partial.unlink(missing_ok=True)
                self.journal.unlink(missing_ok=True)
                raise
        except BaseException:
            os.close(self._file)
            raise
        self.resumed = set(self.directory.tensors)
        self._journal = self.journal.open("a", encoding="utf-8")

    def has(self, name: str) -> bool:
        """Whether a tensor is in the archive already, from this run or from one that was killed."""
        return name in self.directory.tensors or name in self.directory.aliases

    def add(
        self,
        name: str,
        tensor: torch.Tensor,
        partners: Iterable[str] = (),
        done: Callable[[memoryview], None] | None = None,
    ) -> None:
        """Write a tensor. One that is there already is left as it is.

        Args:
            name: its name in the model.
            tensor: dense or a `QuantizedTensor`, on any device; not a slice that begins inside a block.
            partners: names that the model ties to it. When one of them holds the same bytes, they are stored once;
                two tensors that are equal by chance stay two.
            done: called with each piece of a dense tensor that has been written.

        Raises:
            OutputError: the disk is full.
            CheckpointError: a slice, or a dtype that archives do not hold.
        """
        if self.has(name):
            return
        if isinstance(tensor, QuantizedTensor):
            entry = self._quantized(name, tensor)
        else:
            entry = Entry(tensor.dtype, tuple(tensor.shape), {"data": self._write(_bytes(tensor), False, done)})
        twin = next((partner for partner in partners if self._equal(entry, partner)), None)
        if twin is None:
            self.directory.tensors[name] = entry
            self._note({"tensor": name, "entry": encode_entry(entry)})
        else:
            self._end = min(section.offset for section in entry.parts.values())
            self.tie(name, twin)
            self._note({"tensor": name, "same_as": twin})

    def placeholder(self, name: str) -> torch.Tensor:
        """A tensor that is in the archive, without its bytes: on the meta device."""
        entry = self.directory.tensors[self.directory.aliases.get(name, name)]
        if entry.spec is None:
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        types = {"codes": torch.uint8, "scales": torch.float32 if entry.spec.scale_bits is None else torch.uint8}
        inner: dict[str, torch.Tensor | None] = {}
        for part, section in entry.parts.items():
            dtype = types.get(part, torch.float32)
            inner[part] = torch.empty(section.decoded // dtype.itemsize, dtype=dtype, device="meta")
        if entry.scale_offset is not None:
            inner["scale_offset"] = torch.empty((), device="meta")
        return QuantizedTensor(inner, entry.spec, entry.shape, entry.dtype)

    def tie(self, name: str, target: str) -> None:
        """Record that the model itself makes `name` the same tensor as `target`."""
        self.directory.aliases[name] = self.directory.aliases.get(target, target)
        self.directory.tied.add(name)

    def add_file(self, name: str, data: bytes) -> None:
        """Write a small file: a config, a tokenizer. Files come after the tensors."""
        self.directory.files[name] = self._write(memoryview(data), False)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of a section that was written before.

        Raises:
            OutputError: they are not there: the file was shortened by somebody else.
        """
        data = os.pread(self._file, nbytes, offset)
        if len(data) != nbytes:
            raise OutputError(f"{self.partial} became shorter while it was written; run it again")
        return data

    def finish(self) -> int:
        """Write directory and header, bring everything to the disk and put the archive in its place; its bytes."""
        self._journal.close()
        self._aside.shutdown()
        encoded = encode_directory(self.directory)
        os.ftruncate(self._file, self._end)
        self._put(encoded, self._end)
        os.fsync(self._file)  # what the header vouches for, before the header
        self._put(encode_header(self._end, encoded), 0)
        os.fchmod(self._file, 0o666 & ~umask())
        os.fsync(self._file)
        self.partial.replace(self.path)
        sync(self.path.parent)
        self.journal.unlink()
        os.close(self._file)
        return self._end + len(encoded)

    def close(self, *, keep: bool) -> None:
        """Let go of the files without finishing.

        Args:
            keep: leave them for a later run to continue.
        """
        self._journal.close()
        self._aside.shutdown()
        if not keep:
            self.partial.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
        os.close(self._file)

    def _quantized(self, name: str, tensor: QuantizedTensor) -> Entry:
        if tensor.start or tensor.scale_start:
            raise CheckpointError(f"{name} is a slice that begins inside a block; save the tensor it was cut from")
        parts = {"codes": tensor.codes, "scales": tensor.scales}
        if tensor.scale_absmax is not None:
            parts["scale_absmax"] = tensor.scale_absmax
        offset = None if tensor.scale_offset is None else float(tensor.scale_offset)
        sections = {
            part: self._write(_bytes(inner), part in _COMPRESSED and inner.dtype == torch.uint8)
            for part, inner in parts.items()
        }
        return Entry(tensor.dtype, tuple(tensor.shape), sections, tensor.spec, offset)

    def _write(self, data: memoryview, entropy: bool, done: Callable[[memoryview], None] | None = None) -> Section:
        frames = archive_codec.compress(data) if entropy and self._compress else None
        pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE)) if frames is None else frames
        offset, place, crc = self._end, self._end, 0
        for piece in pieces:
            crc = crc32(piece, crc)
            self._put(piece, place)
            place += len(piece)
            if done is not None and isinstance(piece, memoryview):
                done(piece)
        self._aside.submit(_start_writeback, self._file, offset, place - offset)
        self._end = aligned(place)
        # Written and not truncated to: that waits for the disk to have the pages before, and something may lie here
        # already, which a tensor has left that its partner stands for.
        self._put(bytes(self._end - place), place)
        self.written += place - offset
        if frames is None:
            return Section(offset, len(data), crc, len(data))
        return Section(offset, place - offset, crc, len(data), CHUNK, tuple(map(len, frames)))

    def _put(self, data: bytes | memoryview, place: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, place)
            view, place = view[done:], place + done

    def _equal(self, entry: Entry, name: str) -> bool:
        other = self.directory.tensors.get(name)
        return (
            other is not None
            and (other.dtype, other.shape, other.spec) == (entry.dtype, entry.shape, entry.spec)
            and other.scale_offset == entry.scale_offset
            and all(self._same(section, other.parts[part]) for part, section in entry.parts.items())
        )

    def _same(self, a: Section, b: Section) -> bool:
        if (a.crc32, a.nbytes, a.chunk, a.frames) != (b.crc32, b.nbytes, b.chunk, b.frames):
            return False
        return all(
            os.pread(self._file, min(_READ, a.nbytes - start), a.offset + start)
            == os.pread(self._file, min(_READ, a.nbytes - start), b.offset + start)
            for start in range(0, a.nbytes, _READ)
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have finished in between: then this file is the archive, and not ours to touch.
            ours = self.partial.stat().st_ino == os.fstat(self._file).st_ino
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise OutputError(f"another process is writing {self.path}; let it finish or name another file")

    def _resume(self) -> int:
        """Take over what a killed run left; where the next section goes."""
        end = HEADER_SIZE
        kept = []
        for line, note in self._notes():
            if "entry" in note:
                entry = decode_entry(note["tensor"], note["entry"])
                if not all(self._intact(section) for section in entry.parts.values()):
                    break
                self.directory.tensors[note["tensor"]] = entry
                end = max(section.end for section in entry.parts.values())
            else:
                self.tie(note["tensor"], note["same_as"])
            kept.append(line)
        os.ftruncate(self._file, end)
        self._put(bytes(HEADER_SIZE), 0)
        self.journal.write_text("".join([f"{self._request}\n", *kept]), encoding="utf-8")
        return end

    def _notes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The journal's lines up to the first that is torn; none when it is another request's."""
        try:
            lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        except (FileNotFoundError, UnicodeDecodeError):
            return
        if not lines or lines[0] != f"{self._request}\n":
            return
        for line in lines[1:]:
            crc, _, text = line.rstrip("\n").partition(" ")
            if not line.endswith("\n") or crc != f"{zlib.crc32(text.encode()):08x}":
                return
            yield line, json.loads(text)

    def _intact(self, section: Section) -> bool:
        crc = 0
        for start in range(0, section.nbytes, _READ):
            crc = crc32(os.pread(self._file, min(_READ, section.nbytes - start), section.offset + start), crc)
        return crc == section.crc32

    def _note(self, note: dict[str, Any]) -> None:
        text = json.dumps(note, ensure_ascii=False)
        self._journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        self._journal.flush()


@contextmanager
def new_archive(path: str | Path, request: Mapping[str, Any], *, compress: bool = False) -> Iterator[ArchiveWriter]:
    """An archive to write into; it is at `path` when the block ends well.

    When the block is interrupted (Ctrl-C, a kill) what was finished is kept for the same request to continue; when it
    fails, nothing is kept. An older archive at `path` is replaced in the last moment, and by nothing but a whole one.

    Args:
        path: ends in `.nf4dq`.
        request: what makes a run the same run: model, options. Anything that JSON holds, and paths, which stand for
            what is there.
        compress: entropy-code codes and scales.

    Raises:
        OutputError: `path` is something else than an archive or cannot be written, another process is writing it, or
            the disk is full.
        RequestError: `compress` without zstandard.
    """
    if compress:
        archive_codec.zstandard("compressing an archive")
    with _writer(path, request, compress) as writer:
        yield writer
        writer.finish()


@contextmanager
def scratch_archive(path: str | Path, request: Mapping[str, Any]) -> Iterator[ArchiveWriter]:
    """An archive that is only a step on the way to something else: as `new_archive`, and gone when the block ends.

    Raises:
        OutputError: see `new_archive`.
    """
    with _writer(path, request, False) as writer:
        yield writer
        writer.close(keep=False)


@contextmanager
def _writer(path: str | Path, request: Mapping[str, Any], compress: bool) -> Iterator[ArchiveWriter]:
    target = check_output_archive(path).absolute()
    made: list[Path] = []
    try:
        made = make_parents(target.parent)
        writer = ArchiveWriter(target, request, compress)
    except OSError as error:
        raise as_output_error(error, target) from None
    try:
        yield writer
    except BaseException as error:
        kept = isinstance(error, KeyboardInterrupt)
        writer.close(keep=kept)
        with suppress(OSError):  # somebody else has put something there
            for parent in made if not kept else ():
                parent.rmdir()
        raise as_output_error(error, target) from None


def check_output_archive(path: str | Path) -> Path:
    """Check, before any work is done, that an archive can be written to `path`.

    Raises:
        OutputError: it is a folder or a file that is no archive, has another ending, or its parent cannot be written.
    """
    file = Path(path)
    if file.suffix != SUFFIX:
        raise OutputError(f"{file} does not end in {SUFFIX}; name the archive so")
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name a file")
    if file.exists():
        with file.open("rb") as existing:
            if existing.read(len(MAGIC)) != MAGIC:
                raise OutputError(f"{file} exists and is no archive; name a new file or remove it yourself")
    check_parent(file)
    return file


def source_state(source: Path) -> list[list[Any]]:
    """What tells one source from another without reading it: its files' names, sizes and times."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system to bring a range to the disk from now on, so that the last fsync finds little left to do.

    A hint, and only on Linux, where the system would else wait for up to 30 seconds.
    """
    if _SYNC_FILE_RANGE is not None and nbytes:
        _SYNC_FILE_RANGE(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16; bytes are what is wanted anyway. An empty tensor cannot be viewed as another dtype's.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
