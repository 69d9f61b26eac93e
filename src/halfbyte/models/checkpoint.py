"""Reading a model folder: safetensors shards, one tensor at a time.

Memory is the point. A memory-mapped shard stays in a process's resident size page by page as it is read, so a loader
that keeps its shards open peaks at the size of the file. `LazyTensor` opens its shard for one tensor, reads that
tensor and closes it again: the peak is what has been kept so far and the tensor in hand (transformers#43032). For a
reader that keeps nothing (`Checkpoint.map_tensors`) it maps the part of the shard where the tensor lies, which saves
the copy and the pages for it: of 268 MB in the file cache, 24 ms of CPU time instead of 96 to look at every number.
Such a reader looks for itself, where it has the numbers in its cache anyway.

A tensor is read in pieces by all threads, and each piece is searched for NaN and Inf while it is still in the cache:
one pass over memory instead of two.

Everything that can be wrong with a folder is found before the first weight is read: no config, a shard that the index
names and nobody has, a file that is shorter than its header says. Pickles are never read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import CheckpointError, nearest
from halfbyte.models.mapping import fetch, is_guarded, map_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of each floating dtype: integers of its size, and the bits of its exponent, all of which are set in NaN and Inf alone.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_NAMES = {_DTYPES[name]: name for name in _EXPONENTS}
# Bytes that are read and searched at once: they and the search's temporary fit a core's second-level cache.
_PIECE = 1 << 18
# From here on memory comes from the system, in large pages: a tensor of 23 MB in pages of 4 KiB is 5,600 page faults,
# half of what reading it takes, and the C library would keep it when it is freed.
_LARGE = 1 << 22


class LazyTensor:
    """A tensor in a shard that is read when it is indexed; what transformers' loader calls a slice.

    Attributes:
        name: its key.
        shard: the file that holds it.
        shape: its shape.
        dtype_name: safetensors' name of its dtype ("BF16", ...).
        offset: where its bytes begin in the file.
        mapped: whether a large one is read as a view of the file, where a file that shrinks does no harm; nobody has
            looked for NaN and Inf in it then (see `is_finite`).
    """

    def __init__(
        self,
        name: str,
        shard: Path,
        shape: tuple[int, ...],
        dtype_name: str,
        failures: list[Exception],
        offset: int = 0,
    ) -> None:
        self.name, self.shard, self.shape, self.dtype_name, self.offset = name, shard, shape, dtype_name, offset
        self._failures = failures
        self.mapped = False

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype; a float8 or other exotic one is refused when it is read."""
        return _DTYPES.get(self.dtype_name, torch.uint8)

    @property
    def stored(self) -> str:
        """What the values are stored in: safetensors' name of a dtype, or a 4-bit or 8-bit format ("nf4", ...)."""
        return self.dtype_name

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        return self.dtype_name

    def is_floating_point(self) -> bool:
        """Whether it holds floating numbers."""
        return self.dtype_name.startswith(("F", "BF"))

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self.read()[index]
        except CheckpointError as error:
            # transformers turns an exception into a report of its own; the loader raises this one instead.
            self._failures.append(error)
            raise

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own or, where it is `mapped`, on pages of the file.

        Raises:
            CheckpointError: the file changed since it was opened, or the tensor holds NaN or Inf; of a view, whoever
                takes it has to look.
        """
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(
                f"{self.shard}: {self.name} is {self.dtype_name}; of these dtypes one is read: {', '.join(_DTYPES)}"
            )
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        view = self.mapped and self.nbytes >= _LARGE and self.offset % self.dtype.itemsize == 0 and is_guarded()
        try:
            with self.shard.open("rb", buffering=0) as file:
                descriptor = file.fileno()
                buffer = self._map(descriptor) if view else _memory(self.nbytes)
                finite = view or self._fill(buffer.numpy(), descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.shard}: cannot read {self.name}: {error.strerror or error}") from None
        if not finite:
            raise CheckpointError(f"{self.shard}: {self.name} holds NaN or Inf; the file is damaged or diverged")
        return buffer.view(self.dtype).view(self.shape)

    def _fill(self, target: np.ndarray[Any, np.dtype[np.uint8]], descriptor: int) -> bool:
        """Read the tensor's bytes, uint8 [nbytes]; whether they are finite numbers only."""

        def read(start: int) -> bool:
            piece = target[start : start + _PIECE]
            done = 0
            while done < len(piece):
                read = os.preadv(descriptor, [piece[done:].data], self.offset + start + done)
                if not read:
                    raise CheckpointError(self._shorter())
                done += read
            return _finite(piece, self.dtype_name)

        starts = range(0, len(target), _PIECE)
        if len(starts) < 4:
            return all(read(start) for start in starts)
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            # Neighbouring pieces by different threads, so that the system's read-ahead sees one run of reads.
            parts = pool.map(lambda first: all(read(start) for start in starts[first::threads]), range(threads))
            return all(parts)

    def _map(self, descriptor: int) -> torch.Tensor:
        try:
            return map_file(descriptor, self.nbytes, self._lost, self.offset)
        except ValueError:  # mmap's own, before anything is mapped
            raise CheckpointError(self._shorter()) from None

    def _lost(self, offset: int) -> str:
        # transformers turns an exception into a report of its own; the loader raises this one instead.
        self._failures.append(CheckpointError(self._shorter()))
        return self._shorter()

    def _shorter(self) -> str:
        return f"{self.shard}: cannot read {self.name}: the file became shorter"


@dataclass(frozen=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """All tensors of a model, by key.

    Attributes:
        path: the folder, or the archive.
        config: config.json, as a dict.
        tensors: key -> lazy tensor.
        failures: errors met while tensors were read, first one first.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    failures: list[Exception] = field(default_factory=list)

    def map_tensors(self) -> None:
        """Read large tensors as views of their file: for whoever is done with one before the next is read."""
        for tensor in self.tensors.values():
            tensor.mapped = True

    def __getitem__(self, key: str) -> LazyTensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def quant_method(self) -> str | None:
        """The quantization that config.json declares ("bitsandbytes", "halfbyte", "gptq", ...), or None."""
        declared = self.config.get("quantization_config") or {}
        method = declared.get("quant_method")
        return "bitsandbytes" if method is None and declared.get("load_in_4bit") else method


def read_config(path: str | Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        CheckpointError: the folder or the file does not exist, or is not a JSON object.
    """
    folder = Path(path)
    if folder.suffix == ".gguf":
        raise CheckpointError(
            f"{folder} is a GGUF file, which halfbyte writes and does not read; name the model that it was made from, "
            "or run it with llama.cpp"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder{_near(folder)}")
    file = folder / "config.json"
    if not file.is_file():
        kind = "an adapter; name its base model" if (folder / "adapter_config.json").is_file() else "no model folder"
        raise CheckpointError(f"{folder} has no config.json, so it is {kind}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not an object")
    return config


def open_folder(path: str | Path) -> Checkpoint:
    """Open a model folder: read its config and every shard's header, and check that all of it is there.

    Raises:
        CheckpointError: something is missing, truncated, or only there as a pickle.
    """
    folder = Path(path)
    config = read_config(folder)
    failures: list[Exception] = []
    tensors: dict[str, LazyTensor] = {}
    for shard, expected in _shards(folder).items():
        found = _open_shard(shard, failures)
        absent = sorted(expected - found.keys())
        if absent:
            raise CheckpointError(f"{shard} lacks {absent[0]}, which {INDEX} says is in it")
        tensors.update(found)
    return Checkpoint(folder, config, tensors, failures)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Shard -> the keys that the index expects in it (none for a single file)."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str]] = {}
            for key, name in weight_map.items():
                shards.setdefault(folder / name, set()).add(key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from None
        outside = next((name for name in weight_map.values() if Path(name).name != name), None)
        if outside is not None:
            raise CheckpointError(f"{index} names the shard {outside!r}, which is outside the folder")
        missing = sorted(shard.name for shard in shards if not _is_file(shard))
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}")
        return shards
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code and is never read; convert it "
            "where you trust it: AutoModel.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _open_shard(shard: Path, failures: list[Exception]) -> dict[str, LazyTensor]:
    try:
        with safe_open(shard, framework="pt", device="cpu"):
            # It has checked every shape and offset in the header against the file, and keeps the offsets to itself.
            pass
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        found = {}
        for key, entry in entries.items():
            if key != "__metadata__":
                offset = 8 + length + entry["data_offsets"][0]
                found[key] = LazyTensor(key, shard, tuple(entry["shape"]), entry["dtype"], failures, offset)
        return found
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be opened: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shard} is truncated or damaged: {error}") from None


def _memory(size: int) -> torch.Tensor:
    """Memory to read into: uint8 [size]."""
    if size < _LARGE:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number in a tensor on the CPU is NaN or Inf; pages of a file that it lies on are fetched."""
    name = _NAMES.get(tensor.dtype)
    if name is None or not tensor.numel():
        return True
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        fetch(piece)
        if not _finite(piece, name):
            return False
    return True


def _finite(piece: np.ndarray[Any, np.dtype[np.uint8]], dtype_name: str) -> bool:
    """Whether no number in a run of bytes is NaN or Inf."""
    if dtype_name not in _EXPONENTS or not len(piece):
        return True
    integers, exponent = _EXPONENTS[dtype_name]
    return bool((piece.view(integers) & integers(exponent)).max() != exponent)


def _near(folder: Path) -> str:
    parent = folder.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return f"; {nearest(folder.name, names)}" if names else ""
