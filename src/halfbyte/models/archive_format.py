"""`.nf4dq`, the archive: what its bytes mean. docs/nf4dq.md is the specification, this module implements it.

    header (64 bytes) | section | section | ... | directory (JSON)

The header is written last and says where the directory is; the directory names every tensor and file and the sections
that hold their bytes. Sections follow each other, each on the next multiple of 64, with zeros between: nothing can
overlap, nothing can hide, and every byte of the file is under a checksum or known to be zero.

The checksum is CRC-32, zlib's. It finds every change of up to 32 neighbouring bits for certain and any other with
1 - 2**-32; it is in the standard library of every language; and it runs at memory's pace (2.2 GB/s a core where
BLAKE2b does 0.8 and SHA-256 1.1; docs/log.md), so checking can be the default. It is no protection from forgery:
whoever can write the file can write the checksums. What protects the reader is that nothing in the file is executed and
that every size is checked against the file before memory is taken.

This module reads and writes descriptions only; `archive_reader` and `archive_writer` move bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import SCALE_BLOCK, QuantSpec
from halfbyte.formats.double_quant import scale_table
from halfbyte.formats.packing import packed_size

SUFFIX = ".nf4dq"
# As PNG's: the high bit finds a transfer that drops it, CR LF one that "corrects" line ends.
MAGIC = b"\x89NF4DQ\r\n"
MAJOR, MINOR = 1, 0
ALIGNMENT = 64
# magic, major, minor, alignment, directory offset, directory length, file length, directory CRC, 16 reserved, own CRC
HEADER = struct.Struct("<8sHHIQQQI16xI")
HEADER_SIZE = 64
MAX_DIRECTORY = 1 << 28
# Decoded bytes of one compressed frame. A power of two from 64 KiB, so that threads share the work, to 16 MiB.
CHUNK = 1 << 18
CHUNKS = tuple(1 << bits for bits in range(16, 25))
# Codes and scales shrink by a few percent. A section that claims more than this is not ours and would take memory that
# the file does not pay for.
MAX_EXPANSION = 8
PACKING = "high-first"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_LOGICAL = ("float32", "bfloat16", "float16")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_MAX_NAME, _MAX_DIMENSIONS = 1024, 16


@dataclass(frozen=True)
class Section:
    """A run of bytes in the file.

    Attributes:
        offset: where it begins, a multiple of 64.
        nbytes: bytes in the file.
        crc32: of these bytes.
        decoded: bytes after decoding; `nbytes` when it is not compressed.
        chunk: decoded bytes of each frame but the last; 0 when it is not compressed.
        frames: bytes in the file of each frame.
    """

    offset: int
    nbytes: int
    crc32: int
    decoded: int
    chunk: int = 0
    frames: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Where the next section begins."""
        return aligned(self.offset + self.nbytes)


@dataclass(frozen=True)
class Entry:
    """A tensor: its description and where its parts are.

    Attributes:
        dtype: the (logical) dtype.
        shape: the (logical) shape.
        parts: "data" for a dense tensor; "codes", "scales" and perhaps "scale_absmax" for a quantized one.
        spec: the encoding; None for a dense tensor.
        scale_offset: the number that double quantization took off all scales.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: dict[str, Section]
    spec: QuantSpec | None = None
    scale_offset: float | None = None


@dataclass
class Directory:
    """What an archive holds.

    Attributes:
        generator: who wrote it.
        files: name -> the section of a small file (config.json, tokenizer.json, ...).
        tensors: name -> entry.
        aliases: name -> the tensor that it shares its bytes with.
        tied: the aliases that the model makes itself, by its config; a loader leaves them to it.
    """

    generator: str
    files: dict[str, Section] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)

    def sections(self) -> Iterable[tuple[str, Section]]:
        """Every section with words for it, in the order of the file."""
        named = [(f"file {name}", section) for name, section in self.files.items()]
        for name, entry in self.tensors.items():
            named += [(f"tensor {name} ({part})", section) for part, section in entry.parts.items()]
        return sorted(named, key=lambda item: (item[1].offset, item[1].nbytes))


def aligned(offset: int) -> int:
    """The next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def part_sizes(shape: Iterable[int], dtype: torch.dtype, spec: QuantSpec | None) -> dict[str, int]:
    """Decoded bytes of each part of a tensor."""
    count = math.prod(shape)
    if spec is None:
        return {"data": count * dtype.itemsize}
    blocks = -(-count // spec.block_size)
    codes = packed_size(count, spec.codebook.bits)
    if spec.scale_bits is None:
        return {"codes": codes, "scales": 4 * blocks}
    return {
        "codes": codes,
        "scales": packed_size(blocks, spec.scale_bits),
        "scale_absmax": 4 * -(-blocks // SCALE_BLOCK),
    }


# ---------------------------------------------------------------------------------------------------------------- write
def encode_header(offset: int, directory: bytes) -> bytes:
    """The 64 bytes that make the file an archive."""
    fields = (MAGIC, MAJOR, MINOR, ALIGNMENT, offset, len(directory), offset + len(directory), zlib.crc32(directory))
    return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)[:60]))


def encode_directory(directory: Directory) -> bytes:
    """The directory as JSON in UTF-8; equal directories give equal bytes."""
    tensors: dict[str, Any] = {name: encode_entry(entry) for name, entry in directory.tensors.items()}
    for name, target in directory.aliases.items():
        tensors[name] = {"same_as": target, "tied": name in directory.tied}
    specs = [entry.spec for entry in directory.tensors.values() if entry.spec is not None]
    value = {
        "generator": directory.generator,
        # So that a reader needs no table of its own.
        "codebooks": {spec.format: list(spec.codebook.values) for spec in specs},
        "scale_tables": {
            str(spec.scale_bits): scale_table(spec.scale_bits).tolist() for spec in specs if spec.scale_bits is not None
        },
        "files": {name: encode_section(section) for name, section in directory.files.items()},
        "tensors": tensors,
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()


def encode_entry(entry: Entry) -> dict[str, Any]:
    """A tensor's description as the directory holds it."""
    value: dict[str, Any] = {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
    if entry.spec is not None:
        value |= {
            "format": entry.spec.format,
            "block_size": entry.spec.block_size,
            "packing": PACKING,
            "scale_bits": entry.spec.scale_bits or 32,
        }
        if entry.spec.scale_bits is not None:
            value |= {"scale_block": SCALE_BLOCK, "scale_offset": entry.scale_offset}
    return value | {part: encode_section(section) for part, section in entry.parts.items()}


def encode_section(section: Section) -> dict[str, Any]:
    """A section as the directory holds it."""
    value: dict[str, Any] = {"offset": section.offset, "nbytes": section.nbytes, "crc32": section.crc32}
    if section.chunk:
        value["zstd"] = {"nbytes": section.decoded, "chunk": section.chunk, "frames": list(section.frames)}
    return value


# ----------------------------------------------------------------------------------------------------------------- read
def decode_header(header: bytes, size: int) -> tuple[int, int, int]:
    """Offset, length and CRC of the directory.

    Args:
        header: the first 64 bytes of the file, or fewer.
        size: bytes of the file.

    Raises:
        CheckpointError: it is no archive, of a newer version, damaged, or of another length.
    """
    if header[:8] != MAGIC:
        raise CheckpointError(f"is not an {SUFFIX} archive (it begins with {header[:8]!r})")
    if len(header) < HEADER_SIZE:
        raise CheckpointError(f"is truncated: it has {size} bytes, and the header alone has {HEADER_SIZE}")
    _, major, minor, alignment, offset, length, file_length, crc, own = HEADER.unpack(header)
    if zlib.crc32(header[:60]) != own:
        raise CheckpointError("has a damaged header: its checksum does not match")
    if major != MAJOR:
        raise CheckpointError(f"has format version {major}.{minor}, and this halfbyte reads {MAJOR}.x; update halfbyte")
    if file_length != size:
        what = "is truncated" if size < file_length else "has bytes after its end"
        raise CheckpointError(f"{what}: it has {size} bytes, and its header says {file_length}")
    if alignment != ALIGNMENT or offset % ALIGNMENT or offset < HEADER_SIZE or offset + length != size:
        raise CheckpointError("has a header that places the directory outside the file")
    if length > MAX_DIRECTORY:
        raise CheckpointError(f"has a directory of {length} bytes; more than {MAX_DIRECTORY} are not read")
    return offset, length, crc


def decode_directory(data: bytes, offset: int) -> Directory:
    """The directory from its bytes, every number of it checked.

    Args:
        data: its JSON.
        offset: where it lies, which is where the last section ends.

    Raises:
        CheckpointError: it is not what the specification says; the message names the part.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a directory that is not JSON: {error}") from None
    _need(isinstance(value, dict), "directory", "is not an object")
    files, tensors = value.get("files"), value.get("tensors")
    _need(isinstance(files, dict) and isinstance(tensors, dict), "directory", "lacks files or tensors")
    generator = value.get("generator")
    directory = Directory(generator if isinstance(generator, str) and generator.isprintable() else "unknown")
    for name, section in files.items():
        _need(bool(_FILE_NAME.fullmatch(name)), f"file {name!r}", "has a name that is no plain file name")
        directory.files[name] = decode_section(f"file {name}", section, None)
    for name, entry in tensors.items():
        fine = 0 < len(name) <= _MAX_NAME and name.isprintable()
        _need(fine, f"tensor {name[:40]!r}", f"has a name that is empty, not printable or above {_MAX_NAME} characters")
        _need(isinstance(entry, dict), f"tensor {name}", "is not described by an object")
        if "same_as" in entry:
            directory.aliases[name] = entry["same_as"]
            directory.tied |= {name} if entry.get("tied") is True else set()
        else:
            directory.tensors[name] = decode_entry(name, entry)
    for name, target in directory.aliases.items():
        known = isinstance(target, str) and target in directory.tensors
        _need(known, f"tensor {name}", f"is said to be the same as {target!r}, which is not there")
    _check_tables(value, directory)
    _check_places(directory, offset)
    return directory


def decode_entry(name: str, value: Mapping[str, Any]) -> Entry:
    """A tensor's description from the directory.

    Raises:
        CheckpointError: it contradicts itself or describes something that is not offered.
    """
    what = f"tensor {name}"
    dtype, shape = value.get("dtype"), value.get("shape")
    _need(isinstance(dtype, str) and dtype in DTYPES, what, f"has dtype {dtype!r}, which is not offered")
    fine = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(_is_size(size) for size in shape)
    _need(fine, what, f"has shape {str(shape)[:80]}, which is no list of sizes")
    assert isinstance(dtype, str) and isinstance(shape, list)
    # A size of 0 would hide others whose product, a stride, is beyond 64 bits.
    extent = math.prod(size or 1 for size in shape)
    _need(_is_size(8 * extent), what, f"has shape {str(shape)[:80]}, which is too large")
    spec = None
    if "format" in value:
        _need(dtype in _LOGICAL, what, f"is quantized and has dtype {dtype}")
        _need(value.get("packing") == PACKING, what, f"has packing {value.get('packing')!r}, which is not offered")
        spec = _decode_spec(what, value)
    sizes = part_sizes(shape, DTYPES[dtype], spec)
    parts = {part: decode_section(f"{what} ({part})", value.get(part), size) for part, size in sizes.items()}
    offset = value.get("scale_offset")
    if spec is not None and spec.scale_bits is not None:
        number = isinstance(offset, (int, float)) and not isinstance(offset, bool) and abs(offset) < 3.5e38
        _need(number, what, f"has the scale offset {str(offset)[:40]}, which is no float32")
        return Entry(DTYPES[dtype], tuple(shape), parts, spec, float(offset))  # type: ignore[arg-type]
    return Entry(DTYPES[dtype], tuple(shape), parts, spec)


def decode_section(what: str, value: Any, expected: int | None) -> Section:
    """A section from the directory.

    Args:
        what: words for it.
        value: its description.
        expected: decoded bytes that the tensor's description asks for; None: any.

    Raises:
        CheckpointError: a number is missing or impossible.
    """
    _need(isinstance(value, dict), what, "is missing from the directory")
    offset, nbytes, crc = (value.get(key) for key in ("offset", "nbytes", "crc32"))
    fine = _is_size(offset) and _is_size(nbytes) and _is_size(crc) and crc < 1 << 32
    _need(fine, what, "has an offset, size or checksum that is no such number")
    section = Section(offset, nbytes, crc, nbytes)
    if "zstd" in value:
        section = _decode_compression(what, section, value["zstd"])
    if expected is not None and section.decoded != expected:
        _need(False, what, f"has {section.decoded} bytes, and its description asks for {expected}")
    return section


def _decode_compression(what: str, section: Section, value: Any) -> Section:
    _need(isinstance(value, dict), what, "has a compression that is no object")
    decoded, chunk, frames = (value.get(key) for key in ("nbytes", "chunk", "frames"))
    fine = _is_size(decoded) and _is_size(chunk) and chunk in CHUNKS and isinstance(frames, list)
    fine = fine and all(_is_size(size) and size for size in frames)
    fine = fine and len(frames) == -(-decoded // chunk) and sum(frames) == section.nbytes
    _need(fine, what, "has frames that do not make up its size")
    limit = MAX_EXPANSION * section.nbytes
    _need(decoded <= limit, what, f"claims to decode from {section.nbytes} to {decoded} bytes, above {limit}")
    return Section(section.offset, section.nbytes, section.crc32, decoded, chunk, tuple(frames))


def _decode_spec(what: str, value: Mapping[str, Any]) -> QuantSpec:
    bits = value.get("scale_bits")
    _need(_is_size(bits) and bool(bits), what, f"has scale_bits {bits!r}, which is not offered")
    try:
        spec = QuantSpec(value["format"], value.get("block_size"), None if bits == 32 else bits)  # type: ignore[arg-type]
    except (FormatError, TypeError) as error:
        raise CheckpointError(f"is damaged: {what} has an encoding not offered: {str(error)[:200]}") from None
    second = spec.scale_bits is None or value.get("scale_block") == SCALE_BLOCK
    _need(second, what, f"has second-level blocks of {value.get('scale_block')!r}, not {SCALE_BLOCK}")
    return spec


def _check_tables(value: Mapping[str, Any], directory: Directory) -> None:
    """Kernels have the tables built in: a file with others would be decoded to other numbers without a word."""
    codebooks, scale_tables = value.get("codebooks"), value.get("scale_tables")
    _need(isinstance(codebooks, dict) and isinstance(scale_tables, dict), "directory", "lacks its tables")
    assert isinstance(codebooks, dict) and isinstance(scale_tables, dict)
    for spec in {entry.spec for entry in directory.tensors.values() if entry.spec is not None}:
        same = _same_numbers(codebooks.get(spec.format), list(spec.codebook.values))
        _need(same, f"codebook {spec.format}", "is not the table of that format")
        if spec.scale_bits is not None:
            same = _same_numbers(scale_tables.get(str(spec.scale_bits)), scale_table(spec.scale_bits).tolist())
            _need(same, f"scale table {spec.scale_bits}", "is not the table of that width")


def _same_numbers(stored: Any, table: list[float]) -> bool:
    return bool(stored == table) and not any(isinstance(value, bool) for value in stored)


def _check_places(directory: Directory, end: int) -> None:
    place = HEADER_SIZE
    for what, section in directory.sections():
        _need(section.offset == place, what, f"lies at {section.offset}, and the section before it ends at {place}")
        place = section.end
        _need(place <= end, what, f"reaches to {section.offset + section.nbytes}, beyond the sections' end at {end}")
    _need(place == end, "directory", f"lies at {end}, and the last section ends at {place}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _need(condition: bool, what: str, problem: str) -> None:
    if not condition:
        # What a hostile file says is quoted, and may be long.
        raise CheckpointError(f"is damaged: {what} {problem[:200]}")
