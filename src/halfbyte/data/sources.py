"""What a recipe's `dataset` names: files, folders, data sets on the hub, each with a weight.

A name is looked for on the hub only when it cannot be meant as a path: it has the form `owner/name`, nothing lies
there, its first half is no folder here, and it does not end like a data file. Everything else is a path, and nothing
reaches for a network.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.data.problems import Problems
from halfbyte.data.read import SUFFIXES, TEXT_SUFFIXES, Row, read_rows
from halfbyte.errors import DataError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What lies beside the data in a folder made by the Hugging Face libraries.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Source:
    """One entry of `dataset`.

    Attributes:
        path: a data file, a folder of data files, or a data set on the hub (`owner/name`).
        weight: share of this source among the rows, relative to the other weights; None: all of its rows.
        split: of a data set on the hub.
        name: the configuration of a data set on the hub.
    """

    path: str
    weight: float | None = None
    split: str = "train"
    name: str | None = None


class Table(ABC):
    """Something that rows are read from, again and again.

    Attributes:
        name: the file, or the data set and its split.
    """

    name: str

    @abstractmethod
    def rows(self, problems: Problems) -> Iterator[Row]:
        """The rows, in order; see `read_rows`."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Equal digests mean equal rows."""


class FileTable(Table):
    """A data file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def rows(self, problems: Problems) -> Iterator[Row]:
        """See `read_rows`."""
        return read_rows(self.path, problems)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, and of the suffix, which says how the content is read."""
        content = hashlib.sha256(self.path.suffix.lower().encode())
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                content.update(chunk)
        return content.hexdigest()


class HubTable(Table):
    """A split of a data set on the hub."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = f"{source.path} ({source.split})"

    @cached_property
    def _dataset(self) -> Any:
        from datasets import load_dataset

        source = self.source
        try:
            return load_dataset(source.path, source.name, split=source.split)
        except Exception as error:  # the library raises OSError, ValueError and its own, some of them without a base
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{source.path} is no file or folder here, and cannot be loaded from the hub: {reason.rstrip('.')}."
            ) from error

    def rows(self, problems: Problems) -> Iterator[Row]:
        """Records of the split, numbered from 1."""
        for number, record in enumerate(self._dataset, 1):
            yield Row(record, f"{self.name}, row {number}")

    @property
    def digest(self) -> str:
        """The library's own fingerprint of the content."""
        return str(self._dataset._fingerprint)


def is_hub_dataset(name: str, folder: Path = Path()) -> bool:
    """Whether `name`, which may be a path relative to `folder`, is looked for on the hub."""
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith(SUFFIXES):
        return False
    return not (folder / name).exists() and not (folder / name.split("/")[0]).exists()


def open_tables(source: Source) -> list[Table]:
    """The files of a source, in the order of their names; or its split on the hub.

    In a folder, text files count only where there are no records: beside those, a text file is a README.

    Raises:
        DataError: a folder without data files.
    """
    path = Path(source.path)
    if is_hub_dataset(source.path):
        return [HubTable(source)]
    if not path.is_dir():
        return [FileTable(path)]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix.lower() in SUFFIXES]
    files = [p for p in files if p.name not in _NO_DATA and not _hidden(p.relative_to(path))]
    records = [p for p in files if p.suffix.lower() not in TEXT_SUFFIXES]
    if not files:
        raise DataError(f"data folder {path} holds no data files; those end in {', '.join(SUFFIXES)}.")
    return [FileTable(p) for p in records or files]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)
