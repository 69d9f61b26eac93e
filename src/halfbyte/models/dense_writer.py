"""A folder of dense safetensors shards, written one tensor at a time and in any order.

safetensors' own writer takes a whole shard at once, so its memory is the shard's. Names, shapes and dtypes are known
before the first weight is: every shard's header is written first, and each tensor then goes to the place that the
header gives it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.models.checkpoint import INDEX, SINGLE
from halfbyte.models.sources import SAFETENSORS

SHARD_SIZE = 5_000_000_000  # bytes, as transformers' max_shard_size


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class DenseWriter:
    """Shards in a folder.

    Args:
        folder: exists and is empty of weights.
        layout: name -> a tensor of the shape and dtype that will be written, best on the meta device.
        shard_size: bytes of a shard; a tensor that is larger has one of its own.
    """

    def __init__(self, folder: Path, layout: Mapping[str, torch.Tensor], shard_size: int = SHARD_SIZE) -> None:
        self._places: dict[str, _Place] = {}
        self._missing = set(layout)
        shards = _shards(layout, shard_size)
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        files = [folder / name for name in names] if len(shards) > 1 else [folder / SINGLE]
        for file, shard in zip(files, shards, strict=True):
            self._begin(file, {name: layout[name] for name in shard})
        if len(shards) > 1:
            total = sum(tensor.numel() * tensor.element_size() for tensor in layout.values())
            weight_map = {name: place.file.name for name, place in self._places.items()}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the shape and dtype that the layout gave.

        Raises:
            ValueError: it is another shape or dtype, or was written already.
        """
        place = self._places[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype or name not in self._missing:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, or comes twice; expected {place}")
        self._missing.remove(name)
        if not tensor.numel():
            return
        bytes_of: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(bytes_of)
        with place.file.open("r+b", buffering=0) as file:
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done:], place.offset + done)

    def finish(self) -> None:
        """Check that every tensor was written.

        Raises:
            ValueError: one was not.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written, the first is {min(self._missing)}")

    def _begin(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": SAFETENSORS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # so that tensors are aligned
        start = 8 + len(encoded)
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(encoded)) + encoded)
            out.truncate(start + end)
        place = start
        for name, tensor in tensors.items():
            self._places[name] = _Place(file, place, tuple(tensor.shape), tensor.dtype)
            place += tensor.numel() * tensor.element_size()


def _shards(layout: Mapping[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Names in their order, cut into shards; the widest dtype of each comes first, which keeps all aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in layout.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return [_widest_first(shard, layout) for shard in shards]


def _widest_first(names: Iterable[str], layout: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(names, key=lambda name: -layout[name].element_size())
