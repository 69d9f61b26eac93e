"""Reading an archive: opened by its directory, mapped, checked, decoded.

Opening reads the header and the directory and nothing else: milliseconds for a model of any size. Tensors are views of
a mapping of the file. Their pages are the system's file cache: they are read when first touched, shared by all
processes that map the file, and given back under pressure without being written anywhere.

The mapping is private: a program that writes into a tensor (a norm that is trained, an embedding that is resized) gets
its own copy of that page, and neither the file nor another process sees it.

A file that shrinks while it is mapped is an error that names the first section that is gone (`mapping.py` says how and
where its limits are), and `verify` reads through the file system and reports such a file too. Still: never shorten an
archive in place. halfbyte's own writer replaces files and never touches them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError
from halfbyte.models import archive_codec
from halfbyte.models.archive_format import (
    ALIGNMENT,
    HEADER_SIZE,
    SUFFIX,
    Directory,
    Entry,
    Section,
    decode_directory,
    decode_header,
)
from halfbyte.models.checksum import crc32
from halfbyte.models.mapping import is_guarded, map_file
from halfbyte.tensor import QuantizedTensor

_READ = 1 << 20  # bytes checked at once: large enough for the checksum to run at its pace, small enough for a cache


def is_archive(path: str | Path) -> bool:
    """Whether a path is meant as an archive: by its name, whatever is in it."""
    return Path(path).suffix == SUFFIX


class Archive:
    """An open archive.

    Args:
        path: the file.

    Attributes:
        path: the same.
        directory: what it holds.
        nbytes: bytes of the file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or of a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_guarded()  # here, because tensors may be asked for by threads of a loader, which cannot see to it
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error.strerror or error}") from None
        descriptor = self._file.fileno()
        with self._named():
            self.nbytes = os.fstat(descriptor).st_size
            offset, length, crc = decode_header(os.pread(descriptor, HEADER_SIZE, 0), self.nbytes)
            data = os.pread(descriptor, length, offset)
            if len(data) != length or zlib.crc32(data) != crc:
                raise CheckpointError("is damaged: the checksum of its directory does not match")
            self.directory = decode_directory(data, offset)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor: a view of the mapping, or decoded by all threads where it is compressed.

        Raises:
            CheckpointError: there is none of that name, or a compressed section is damaged.
        """
        directory = self.directory
        entry = directory.tensors.get(directory.aliases.get(name, name))
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        if entry.spec is None:
            return self._part(name, entry, "data", entry.dtype).view(entry.shape)
        scales = torch.float32 if entry.spec.scale_bits is None else torch.uint8
        inner: dict[str, torch.Tensor | None] = {
            "codes": self._part(name, entry, "codes", torch.uint8),
            "scales": self._part(name, entry, "scales", scales),
        }
        if entry.scale_offset is not None:
            inner["scale_absmax"] = self._part(name, entry, "scale_absmax", torch.float32)
            inner["scale_offset"] = torch.tensor(entry.scale_offset, dtype=torch.float32)
        return QuantizedTensor(inner, entry.spec, entry.shape, entry.dtype)

    def read_file(self, name: str) -> bytes:
        """A file that the archive carries, checked.

        Raises:
            CheckpointError: there is none of that name, or it is damaged.
        """
        section = self.directory.files.get(name)
        if section is None:
            raise CheckpointError(f"{self.path} has no file {name}")
        with self._named():
            self._check(f"file {name}", section)
            data = os.pread(self._file.fileno(), section.nbytes, section.offset)
            if section.chunk:
                data = archive_codec.decompress(memoryview(data), section, self._threads).numpy().tobytes()
            return data

    def verify(self) -> None:
        """Compare every section with its checksum, and everything between sections with zero, on all threads.

        Raises:
            CheckpointError: the first section of the file that is damaged.
        """
        sections = list(self.directory.sections())
        with self._named():
            list(self._threads.map(lambda named: self._check(*named), sections))

    def unpack_files(self, folder: Path) -> None:
        """Write the files that the archive carries (config, tokenizer) into a folder.

        Raises:
            CheckpointError: one of them is damaged.
        """
        for name in self.directory.files:
            (folder / name).write_bytes(self.read_file(name))

    def _part(self, name: str, entry: Entry, part: str, dtype: torch.dtype) -> torch.Tensor:
        section = entry.parts[part]
        if not section.decoded:
            return torch.empty(0, dtype=dtype)
        stored = self._mapped[section.offset : section.offset + section.nbytes]
        if section.chunk:
            with self._named(f"is damaged: tensor {name} ({part}): "):
                stored = archive_codec.decompress(stored.numpy().data, section, self._threads)
        return stored.view(dtype)

    def _check(self, what: str, section: Section) -> None:
        descriptor, crc = self._file.fileno(), 0
        for start in range(0, section.nbytes, _READ):
            size = min(_READ, section.nbytes - start)
            data = os.pread(descriptor, size, section.offset + start)
            if len(data) != size:
                raise CheckpointError(f"is damaged: it became shorter, {what} is no longer whole")
            crc = crc32(data, crc)
        if crc != section.crc32:
            raise CheckpointError(f"is damaged: the checksum of {what} does not match")
        end = section.offset + section.nbytes
        if any(os.pread(descriptor, section.end - end, end)):
            raise CheckpointError(f"is damaged: the {ALIGNMENT}-byte padding after {what} is not zero")

    @cached_property
    def _mapped(self) -> torch.Tensor:
        """The whole file, uint8 [nbytes]."""
        size = os.fstat(self._file.fileno()).st_size
        if size != self.nbytes:
            raise CheckpointError(f"{self.path} had {self.nbytes} bytes when it was opened and has {size} now")
        try:
            return map_file(self._file.fileno(), size, partial(_lost, self.path, self.directory))
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be mapped: {error.strerror or error}; its {size} bytes need as many addresses, "
                "which RLIMIT_AS or RLIMIT_DATA (ulimit -v, ulimit -d) may deny; a limit of memory would not."
            ) from None

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(torch.get_num_threads())

    @contextmanager
    def _named(self, before: str = "") -> Iterator[None]:
        """Errors with the file's name in front."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} {before}{error}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from None


def _lost(path: Path, directory: Directory, offset: int) -> str:
    """What to say when a mapped file turns out to end before `offset`, and below the page size after it."""
    gone = [what for what, section in directory.sections() if section.offset + section.nbytes > offset]
    what = gone[0] if gone else "the directory"
    return f"{path} is damaged: it became shorter while it was mapped, {what} is no longer whole; load it anew"


def describe(archive: Archive) -> dict[str, Any]:
    """What an archive holds, for people: a JSON object. No weight is read."""
    directory = archive.directory
    total = quantized = packed = fixed = 0
    tensors: dict[str, Any] = {}
    for name, entry in directory.tensors.items():
        count = torch.Size(entry.shape).numel()
        stored = sum(section.nbytes for section in entry.parts.values())
        total += count
        fact: dict[str, Any] = {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
        if entry.spec is not None:
            quantized += count
            packed += stored
            fixed += sum(section.decoded for section in entry.parts.values())
            spec = entry.spec
            fact |= {"format": spec.format, "block_size": spec.block_size, "scale_bits": spec.scale_bits or 32}
        tensors[name] = fact | {"bytes": stored}
    tensors |= {name: {"same_as": target} for name, target in directory.aliases.items()}
    facts: dict[str, Any] = {
        "kind": "archive",
        "generator": directory.generator,
        "parameters": total,
        "quantized_share": round(quantized / total, 4) if total else 0.0,
        "bits_per_parameter": round(8 * archive.nbytes / total, 4) if total else 0.0,
        "bytes": archive.nbytes,
    }
    if quantized:
        facts["bits_per_quantized_parameter"] = round(8 * packed / quantized, 4)
        if packed != fixed:
            facts["bits_per_quantized_parameter_uncompressed"] = round(8 * fixed / quantized, 4)
    return facts | {"files": sorted(directory.files), "tensors": tensors}
