"""Reading a model folder: safetensors shards, one tensor at a time.

Memory is the point. A memory-mapped shard stays in a process's resident size page by page as it is read, so a loader
that keeps its shards open peaks at the size of the file. `LazyTensor` opens its shard for one tensor, reads that
tensor and closes it again: the peak is what has been kept so far and the tensor in hand (transformers#43032).

Everything that can be wrong with a folder is found before the first weight is read: no config, a shard that the index
names and nobody has, a file that is shorter than its header says. Pickles are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import CheckpointError, nearest

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


class LazyTensor:
    """A tensor in a shard that is read when it is indexed; what transformers' loader calls a slice.

    Attributes:
        name: its key.
        shard: the file that holds it.
        shape: its shape.
        dtype_name: safetensors' name of its dtype ("BF16", ...).
    """

    def __init__(self, name: str, shard: Path, shape: tuple[int, ...], dtype_name: str, failures: list[Exception]):
        self.name, self.shard, self.shape, self.dtype_name = name, shard, shape, dtype_name
        self._failures = failures

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
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file changed since it was opened, or the tensor holds NaN or Inf.
        """
        try:
            # Read and not mapped: a mapped tensor and its copy would both be resident for a moment.
            with safe_open(self.shard, framework="pt", device="cpu", backend="pread") as file:
                tensor: torch.Tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.shard}: cannot read {self.name}: {error}") from None
        if tensor.is_floating_point() and tensor.numel():
            # One pass without a temporary; both ends are NaN when any element is.
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(f"{self.shard}: {self.name} holds NaN or Inf; the file is damaged or diverged")
        return tensor


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
        missing = sorted(shard.name for shard in shards if not shard.is_file())
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


def _open_shard(shard: Path, failures: list[Exception]) -> dict[str, LazyTensor]:
    try:
        with safe_open(shard, framework="pt", device="cpu") as file:
            found = {}
            for key in file.keys():  # noqa: SIM118  (safe_open has no __iter__)
                part = file.get_slice(key)
                found[key] = LazyTensor(key, shard, tuple(part.get_shape()), part.get_dtype(), failures)
            return found
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is truncated or damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be opened: {error.strerror or error}") from None


def _near(folder: Path) -> str:
    parent = folder.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return f"; {nearest(folder.name, names)}" if names else ""
