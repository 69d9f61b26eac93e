"""Which base an adapter belongs to: a hash that is stored beside the adapter and compared when it is used.

The hash is SHA-256 over every tensor in the order of their names: name, dtype, shape, number of bytes, and samples of
the bytes as they are stored (all of a small tensor; of a large one 16 pieces of 4 KiB, evenly spread from its first
byte to its last). It does not depend on how tensors are distributed over files. It tells two models apart as soon as
training has touched them, and reads a few megabytes of a model of any size, so it can be compared each time an adapter
is loaded; a single number that was changed by hand between the samples it would not see.

A quantized folder or archive holds other bytes than the model that it was made from. Two hashes are compared only when
both are of the same kind of storage; else only names and shapes can say whether an adapter fits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.models.archive_reader import Archive, is_archive
from halfbyte.models.sources import open_checkpoint

BASE_FILE = "base.json"
PIECES, PIECE = 16, 4096
_Part = tuple[str, str, tuple[int, ...], Path, int, int]  # name, dtype, shape, file, offset, bytes


def base_hash(path: str | Path) -> dict[str, Any]:
    """What identifies a model.

    Args:
        path: a model folder or an archive.

    Returns:
        "storage" (how it is stored: "safetensors", "bitsandbytes", "halfbyte" or "nf4dq"), "tensors" and "sha256".

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    digest, count = hashlib.sha256(), 0
    files: dict[Path, int] = {}
    try:
        for name, dtype, shape, file, offset, nbytes in sorted(_parts(path)):
            if file not in files:
                files[file] = os.open(file, os.O_RDONLY)
            digest.update(json.dumps([name, dtype, list(shape), nbytes]).encode())
            for start, size in _samples(nbytes):
                digest.update(os.pread(files[file], size, offset + start))
            count += 1
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    storage = "nf4dq" if is_archive(path) else open_checkpoint(path, verify=False).quant_method or "safetensors"
    return {"storage": storage, "tensors": count, "sha256": digest.hexdigest()}


def write_base(folder: Path, base: str, path: str | Path) -> None:
    """Store in an adapter's folder which base it belongs to.

    Args:
        folder: of the adapter.
        base: its name, as the user gave it.
        path: where it lies.
    """
    text = json.dumps({"base": base, **base_hash(path)}, indent=2)
    (folder / BASE_FILE).write_text(text + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict[str, Any] | None:
    """What `write_base` stored, or None where nothing was.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {key: stored[key] for key in ("base", "storage", "tensors", "sha256")}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None


def other_base(adapter: Path, path: str | Path) -> str:
    """One sentence when an adapter was trained on another base than the one at `path`; "" when not, or not known."""
    stored = read_base(adapter)
    if stored is None or not Path(path).exists():
        return ""
    found = base_hash(path)
    if found["storage"] != stored["storage"] or found["sha256"] == stored["sha256"]:
        return ""
    return (
        f"{path} is not the base that {adapter} was trained on ({stored['base']}, SHA-256 {stored['sha256'][:12]}..., "
        f"and this one has {found['sha256'][:12]}...): expect other answers"
    )


def _parts(path: str | Path) -> Iterator[_Part]:
    """Every run of bytes in the files, with what it is."""
    if is_archive(path):
        archive = Archive(path)
        for name, entry in archive.directory.tensors.items():
            for part, section in entry.parts.items():
                yield f"{name}/{part}", str(entry.dtype), entry.shape, archive.path, section.offset, section.nbytes
        return
    for shard in {tensor.shard for tensor in open_checkpoint(path).values()}:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))  # safetensors has checked it
        for name, fact in header.items():
            if name != "__metadata__":
                begin, end = fact["data_offsets"]
                yield name, fact["dtype"], tuple(fact["shape"]), shard, 8 + length + begin, end - begin


def _samples(nbytes: int) -> list[tuple[int, int]]:
    """Where to read, and how much."""
    if nbytes <= PIECES * PIECE:
        return [(0, nbytes)]
    last = nbytes - PIECE
    return [(last * index // (PIECES - 1), PIECE) for index in range(PIECES)]
