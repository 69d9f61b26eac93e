"""Quantizing a model folder into a folder, in the memory of its largest tensor.

A safetensors file begins with a header that gives every tensor's place, and a packed tensor's description holds a
number that is known only when it has been quantized. So the tensors are first written into a partial archive (which is
never finished, and from which a killed run goes on), and from there into shards: header first, then bytes copied from
file to file. Every tensor is stored as `save_model` stores it of the same model in memory, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import RequestError
from halfbyte.models.archive import quantize_into, saved_config, small_files
from halfbyte.models.archive_format import SUFFIX
from halfbyte.models.archive_writer import ArchiveWriter, scratch_archive
from halfbyte.models.checkpoint import INDEX, SINGLE
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.loading import resolve
from halfbyte.models.saving import check_output_folder, new_folder
from halfbyte.models.sources import SAFETENSORS, model_files
from halfbyte.nn import QuantizationReport
from halfbyte.tensor import QuantizedTensor, flatten

_BLOCK = 1 << 20
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# Where a packed tensor's parts are in an archive, by what their keys end in; everything else of it is small.
_PARTS = {"": "codes", ".absmax": "scales", ".nested_absmax": "scale_absmax"}


class _Key:
    """A tensor of a shard: its description, and its bytes or where they lie in the archive."""

    def __init__(self, name: str, like: torch.Tensor, offset: int | None) -> None:
        self.name, self.dtype, self.shape, self.offset = name, like.dtype, tuple(like.shape), offset
        self.nbytes = like.numel() * like.element_size()
        self.data = like.reshape(-1).view(torch.uint8).numpy().data if offset is None else memoryview(b"")


def quantize_to_folder(
    source: str | Path,
    output: str | Path,
    quantization: HalfbyteConfig,
    *,
    task: str = "causal-lm",
    max_shard_size: str = "5GB",
) -> QuantizationReport:
    """Quantize a model folder into a folder of safetensors shards, one tensor at a time.

    A run that was killed is continued by the same call.

    Args:
        source: a model folder, an archive, or a name on the hub.
        output: a folder that does not exist or is empty.
        quantization: how.
        task: as for `load_model`.
        max_shard_size: "300MB", "5GB"; a tensor that is larger gets a shard of its own.

    Returns:
        What was quantized.

    Raises:
        CheckpointError, FormatError: see `load_model`.
        OutputError: the folder is not empty or cannot be written, or the disk is full.
        RequestError: a size that cannot be read.
    """
    limit, folder = _shard_size(max_shard_size), resolve(source)
    target = check_output_folder(output).absolute()
    request = {"quantization": quantization.own_dict(), "task": task, "source": folder}
    with model_files(folder) as files, scratch_archive(target.with_name(f".{target.name}{SUFFIX}"), request) as archive:
        model = quantize_into(archive, folder, quantization, task)
        config, layout = saved_config(model), "halfbyte"
        if hasattr(config, "quantization_config"):
            declared = model.hf_quantizer.quantization_config
            config.quantization_config, layout = declared.to_dict(), declared.layout
        with new_folder(target) as aside:
            for name, data in small_files(model, config, None, Path(files)):
                (aside / name).write_bytes(data)
            tensors = [_keys(archive, name, layout) for name in _stored(archive, model)]
            _write_shards(aside, archive, tensors, limit, model.num_parameters())
    report: QuantizationReport = model.halfbyte_report
    return report


def _stored(archive: ArchiveWriter, model: Any) -> Iterator[str]:
    """The tensors that a folder holds: not what the model makes by itself."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return (name for name in archive.directory.tensors if name not in ignored)


def _keys(archive: ArchiveWriter, name: str, layout: str) -> list[_Key]:
    """The keys that stand for a tensor in a file."""
    entry, like = archive.directory.tensors[name], archive.placeholder(name)
    if not isinstance(like, QuantizedTensor):
        return [_Key(name, like, entry.parts["data"].offset)]
    assert entry.spec is not None
    if entry.scale_offset is not None:
        like.scale_offset = torch.tensor(entry.scale_offset)
    keys = []
    for key, part in flatten(name, like, layout).items():
        section = entry.parts.get(_PARTS.get(key.removeprefix(name), "none"))
        keys.append(_Key(key, part, None if section is None else section.offset))
    return keys


def _write_shards(folder: Path, archive: ArchiveWriter, tensors: list[list[_Key]], limit: int, count: int) -> None:
    shards: list[list[_Key]] = [[]]
    filled = 0
    for keys in tensors:
        size = sum(key.nbytes for key in keys)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += keys
        filled += size
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, archive, shard)
    if len(shards) > 1:
        total = sum(key.nbytes for shard in shards for key in shard)
        index = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": {key.name: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shard(path: Path, archive: ArchiveWriter, shard: list[_Key]) -> None:
    # As safetensors orders them: the widest types first, so that each tensor is aligned for its own.
    ordered = sorted(shard, key=lambda key: (-key.dtype.itemsize, key.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key in ordered:
        header[key.name] = {
            "dtype": SAFETENSORS[key.dtype],
            "shape": list(key.shape),
            "data_offsets": [place, place + key.nbytes],
        }
        place += key.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        _write(file.fileno(), len(encoded).to_bytes(8, "little") + encoded)
        for key in ordered:
            _write(file.fileno(), key.data)
            for start in range(0, key.nbytes if key.offset is not None else 0, _BLOCK):
                assert key.offset is not None
                _write(file.fileno(), archive.read(key.offset + start, min(_BLOCK, key.nbytes - start)))


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _shard_size(text: str) -> int:
    found = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if found is None or not int(found[1]):
        raise RequestError(f"{text!r} is no size of a shard; write it like 300MB or 5GB")
    return int(found[1]) * _UNITS[found[2]]
