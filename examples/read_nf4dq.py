"""A reader of `.nf4dq` archives that needs only NumPy (and zstandard, for compressed ones).

It is written from docs/nf4dq.md and shares no code with halfbyte, so that it shows that the specification suffices; a
test compares every bit with what halfbyte loads. Use it as it is, or as the start of a reader in another language:

    archive = Archive("model.nf4dq")
    archive.verify()
    weight = archive["model.layers.0.self_attn.q_proj.weight"]      # float32, decoded

    python examples/read_nf4dq.py model.nf4dq                       # check the file and list what is in it
"""

import json
import re
import struct
import sys
import zlib
from math import prod

import numpy as np

MAGIC = b"\x89NF4DQ\r\n"
HEADER = struct.Struct("<8sHHIQQQI16xI")
ALIGNMENT = 64
MAX_DIRECTORY = 1 << 28
MAX_EXPANSION = 8
SCALE_BLOCK = 256
CHUNKS = {1 << bits for bits in range(16, 25)}
# bfloat16 is read as 16-bit integers: NumPy has no such type.
DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
}
CODE_BITS = {"nf4": 4, "fp4": 4, "e2m1": 4, "int4": 4, "int8": 8}
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class Damaged(ValueError):
    """The file is not what the specification says; the message names the part."""


class Archive:
    """An open archive; a mapping from tensor names to decoded arrays.

    Attributes:
        directory: the directory, as the JSON object that it is.
    """

    def __init__(self, path):
        try:
            self._map = np.memmap(path, dtype=np.uint8, mode="r")
        except ValueError:  # NumPy maps no empty file
            raise Damaged("the file is empty") from None
        size, header = len(self._map), bytes(self._map[:64])
        _need(header[:8] == MAGIC, "the file is no .nf4dq archive")
        _need(len(header) == 64, "the header is truncated")
        _, major, _, alignment, offset, length, file_length, crc, own = HEADER.unpack(header)
        _need(zlib.crc32(header[:60]) == own, "the header's checksum does not match")
        _need(major == 1, f"the format version is {major}, this reader knows 1")
        _need(file_length == size, f"the file has {size} bytes, its header says {file_length}")
        _need(
            alignment == ALIGNMENT and offset % ALIGNMENT == 0 and offset >= 64,
            "the header places the directory wrongly",
        )
        _need(offset + length == size and length <= MAX_DIRECTORY, "the header places the directory wrongly")
        data = bytes(self._map[offset:])
        _need(zlib.crc32(data) == crc, "the directory's checksum does not match")
        try:
            self.directory = json.loads(data, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"the directory is not JSON: {error}") from None
        try:
            self._check(offset)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise Damaged(f"the directory lacks something or holds it in another form: {error!r}") from None

    def __iter__(self):
        return iter(self.directory["tensors"])

    def __getitem__(self, name):
        """A tensor in its logical dtype's values: float32 for bfloat16 and for quantized tensors of it."""
        entry = self.entry(name)
        dtype = entry["dtype"]
        if "format" not in entry:
            stored = np.frombuffer(self.part(name, "data"), DTYPES[dtype])
            values = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
            return values.reshape(entry["shape"])
        count, block = prod(entry["shape"]), entry["block_size"]
        codes = unpack(self.part(name, "codes"), CODE_BITS[entry["format"]], count)
        table = np.array(self.directory["codebooks"][entry["format"]], np.float32)
        values = table[codes] * np.repeat(self.scales(name), block)[:count]
        return round_to(values, dtype).reshape(entry["shape"])

    def entry(self, name):
        """The description of a tensor; of the one it is the same as, where it is another name for it."""
        entry = self.directory["tensors"][name]
        return self.directory["tensors"][entry["same_as"]] if "same_as" in entry else entry

    def scales(self, name):
        """The scale of each block: float32 [blocks]."""
        entry = self.entry(name)
        blocks, bits = -(-prod(entry["shape"]) // entry["block_size"]), entry["scale_bits"]
        stored = self.part(name, "scales")
        if bits == 32:
            return np.frombuffer(stored, "<f4")
        table = np.array(self.directory["scale_tables"][str(bits)], np.float32)
        spread = np.repeat(np.frombuffer(self.part(name, "scale_absmax"), "<f4"), SCALE_BLOCK)[:blocks]
        return table[unpack(stored, bits, blocks)] * spread + np.float32(entry["scale_offset"])

    def part(self, name, part):
        """The decoded bytes of one part of a tensor, as uint8."""
        return self._decode(self.entry(name)[part], f"tensor {name} ({part})")

    def file(self, name):
        """The bytes of a file that the archive carries: config.json, tokenizer.json, ..."""
        return bytes(self._decode(self.directory["files"][name], f"file {name}"))

    def verify(self):
        """Compare every section with its checksum and what lies between sections with zero."""
        for what, section, _ in self._sections():
            start, end = section["offset"], section["offset"] + section["nbytes"]
            _need(zlib.crc32(self._map[start:end]) == section["crc32"], f"the checksum of {what} does not match")
            _need(not self._map[end : aligned(end)].any(), f"the padding after {what} is not zero")

    def _sections(self):
        """Words, description and decoded size (None: any) of each section, in the file's order."""
        found = [(f"file {name}", section, None) for name, section in self.directory["files"].items()]
        for name, entry in self.directory["tensors"].items():
            if "same_as" not in entry:
                sizes = part_sizes(entry).items()
                found += [(f"tensor {name} ({part})", entry[part], size) for part, size in sizes]
        return sorted(found, key=lambda item: (item[1]["offset"], item[1]["nbytes"]))

    def _decode(self, section, what):
        stored = self._map[section["offset"] : section["offset"] + section["nbytes"]]
        if "zstd" not in section:
            return stored
        import zstandard

        decoded, chunk = section["zstd"]["nbytes"], section["zstd"]["chunk"]
        result, place, start = np.empty(decoded, np.uint8), 0, 0
        for size in section["zstd"]["frames"]:
            expected, frame = min(chunk, decoded - place), stored[start : start + size].tobytes()
            try:
                fits = zstandard.frame_content_size(frame) == expected
                data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=expected) if fits else b""
            except zstandard.ZstdError as error:
                raise Damaged(f"a frame of {what} cannot be decoded: {error}") from None
            _need(len(data) == expected, f"a frame of {what} decodes to another size than its section")
            result[place : place + expected] = np.frombuffer(data, np.uint8)
            place, start = place + expected, start + size
        return result

    def _check(self, end):
        """Every rule of the specification that the directory alone can break."""
        tensors = self.directory["tensors"]
        for name in self.directory["files"]:
            _need(FILE_NAME.fullmatch(name), f"the file name {name!r} is no plain file name")
        for name, entry in tensors.items():
            if "same_as" in entry:
                target = tensors.get(entry["same_as"])
                _need(target is not None and "same_as" not in target, f"tensor {name} is the same as nothing")
                continue
            _need(entry["dtype"] in DTYPES, f"tensor {name} has an unknown dtype")
            _need(_is_shape(entry["shape"]), f"tensor {name} has no list of sizes for a shape")
            if "format" in entry:
                known = entry["format"] in CODE_BITS and entry["packing"] == "high-first"
                known = (
                    known
                    and entry["scale_bits"] in (4, 6, 8, 32)
                    and entry["block_size"] in [32 << n for n in range(8)]
                )
                known = known and type(entry["scale_bits"]) is type(entry["block_size"]) is int
                known = known and (entry["scale_bits"] == 32 or entry["scale_block"] == SCALE_BLOCK)
                _need(known, f"tensor {name} has an unknown encoding")
                _check_table(self.directory["codebooks"][entry["format"]], CODE_BITS[entry["format"]])
                if entry["scale_bits"] != 32:
                    _check_table(self.directory["scale_tables"][str(entry["scale_bits"])], entry["scale_bits"])
                    _need(_is_number(entry["scale_offset"]), f"tensor {name} has a scale offset that is no number")
        place = 64
        for what, section, expected in self._sections():
            sizes = [section[key] for key in ("offset", "nbytes", "crc32")]
            _need(all(map(_is_size, sizes)), f"{what} has an offset, size or checksum that is no such number")
            _need(section["offset"] == place, f"{what} lies at {section['offset']}, not at {place}")
            place = aligned(place + section["nbytes"])
            _need(place <= end, f"{what} reaches beyond the last section's end")
            decoded = _decoded_size(what, section)
            _need(expected in (None, decoded), f"{what} has {decoded} bytes, its description asks for {expected}")
        _need(place == end, "there are bytes that belong to no section")


def part_sizes(entry):
    """Decoded bytes of each part of a tensor."""
    count = prod(entry["shape"])
    if "format" not in entry:
        return {"data": count * np.dtype(DTYPES[entry["dtype"]]).itemsize}
    blocks, bits = -(-count // entry["block_size"]), entry["scale_bits"]
    sizes = {"codes": packed_size(count, CODE_BITS[entry["format"]]), "scales": packed_size(blocks, bits)}
    return sizes if bits == 32 else sizes | {"scale_absmax": 4 * -(-blocks // SCALE_BLOCK)}


def packed_size(count, bits):
    """Bytes that `count` values of `bits` bits take: 6-bit ones come in groups of four, 4-bit ones in pairs."""
    group, size = {4: (2, 1), 6: (4, 3), 8: (1, 1), 32: (1, 4)}[bits]
    return -(-count // group) * size


def unpack(packed, bits, count):
    """Codes from bytes, the earlier code in the higher bits."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    x, y, z = packed.reshape(-1, 3).T
    return np.stack([x >> 2, (x << 4 | y >> 4) & 63, (y << 2 | z >> 6) & 63, z & 63], axis=1).reshape(-1)[:count]


def round_to(values, dtype):
    """Float32 rounded once, to nearest even, to a logical dtype; bfloat16's values are returned as float32."""
    if dtype != "bfloat16":
        return values.astype(DTYPES[dtype])
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), values, rounded)  # adding to all the bits of a NaN carries it over to 0


def aligned(offset):
    """The next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _decoded_size(what, section):
    if "zstd" not in section:
        return section["nbytes"]
    decoded, chunk, frames = (section["zstd"][key] for key in ("nbytes", "chunk", "frames"))
    fine = _is_size(decoded) and _is_size(chunk) and chunk in CHUNKS and all(_is_size(size) and size for size in frames)
    fine = fine and len(frames) == -(-decoded // chunk) and sum(frames) == section["nbytes"]
    _need(fine, f"{what} has frames that do not make up its size")
    _need(decoded <= MAX_EXPANSION * section["nbytes"], f"{what} claims to decode to {decoded} bytes")
    return decoded


def _check_table(values, bits):
    _need(len(values) == 1 << bits and all(map(_is_number, values)), f"a table is not one of {1 << bits} numbers")


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 3.5e38


def _is_size(value):
    return type(value) is int and 0 <= value < 1 << 62


def _is_shape(value):
    fine = type(value) is list and len(value) <= 16 and all(map(_is_size, value))
    return fine and _is_size(8 * prod(size or 1 for size in value))


def _unique(pairs):
    result = dict(pairs)
    _need(len(result) == len(pairs), "the directory holds a key twice")
    return result


def _need(condition, problem):
    if not condition:
        raise Damaged(problem)


if __name__ == "__main__":
    try:
        opened = Archive(sys.argv[1])
        opened.verify()
    except Damaged as damage:
        sys.exit(f"{sys.argv[1]}: {damage}")
    print("files:", ", ".join(opened.directory["files"]))
    for key in opened:
        described = opened.entry(key)
        print(key, described["dtype"], described["shape"], described.get("format", "dense"))
