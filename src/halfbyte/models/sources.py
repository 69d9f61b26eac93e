"""A model on disk, whatever it is: a folder of safetensors or an archive, behind the same lazy tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError
from halfbyte.models.archive_format import Entry
from halfbyte.models.archive_reader import Archive, is_archive
from halfbyte.models.checkpoint import Checkpoint, LazyTensor, open_folder

SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class MappedTensor(LazyTensor):
    """A tensor in an archive: reading it maps it, or decodes it where it is compressed."""

    def __init__(self, name: str, archive: Archive, entry: Entry, failures: list[Exception]) -> None:
        super().__init__(name, archive.path, entry.shape, SAFETENSORS[entry.dtype], failures)
        self._archive, self._entry = archive, entry

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(section.nbytes for section in self._entry.parts.values())

    def read(self) -> torch.Tensor:
        """The tensor; a `QuantizedTensor` where it is stored as one.

        Raises:
            CheckpointError: a compressed section is damaged.
        """
        return self._archive.tensor(self.name)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a model folder or an archive and check that all of it is there.

    Args:
        path: either.
        verify: compare an archive's checksums; a folder has none.

    Raises:
        CheckpointError: something is missing, truncated, damaged, or only there as a pickle.
    """
    if not is_archive(path):
        return open_folder(path)
    archive = Archive(path)
    if verify:
        archive.verify()
    config = _config(archive)
    directory, failures = archive.directory, list[Exception]()
    # A name that the model ties by itself is left to it: given twice, transformers would compare the two.
    names = [*directory.tensors, *(name for name in directory.aliases if name not in directory.tied)]
    tensors: dict[str, LazyTensor] = {
        name: MappedTensor(name, archive, directory.tensors[directory.aliases.get(name, name)], failures)
        for name in names
    }
    return Checkpoint(archive.path, config, tensors, failures)


def check_model_folder(path: str | Path) -> dict[str, Any]:
    """Check a model folder or an archive without reading weights; returns its config.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    return open_checkpoint(path, verify=False).config


@contextmanager
def model_files(path: str | Path) -> Iterator[str]:
    """What transformers can load configs and tokenizers from: the path itself, or an archive's files, unpacked.

    Raises:
        CheckpointError: an archive that is damaged.
    """
    if not is_archive(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        Archive(path).unpack_files(Path(folder))
        yield folder


def _config(archive: Archive) -> dict[str, Any]:
    try:
        config = json.loads(archive.read_file("config.json"))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{archive.path} has a config.json that is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{archive.path} has a config.json that holds {type(config).__name__}, not an object")
    return config
