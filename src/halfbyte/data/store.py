"""Rows of token ids on disk: written once, mapped into memory, found again by what they were made from.

A data set is a folder of three files: `rows.arrow` (the rows, which `datasets` maps), `facts.npz` (what is known of
each row, see `RowFacts`) and `report.json`. Its name is a hash of everything that its content depends on, so a
changed data file, template, tokenizer or setting makes another one, and nothing has to be invalidated. It appears
complete or not at all: it is written aside and renamed. What was used longest ago goes when there is too much
(`halfbyte.data.eviction`).

Token ids are int32. What is held in memory while a million rows are written is one batch of them and the facts, 24
bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from halfbyte import env
from halfbyte.data.eviction import BUILDING, evict, hold
from halfbyte.data.lengths import LengthReport, RowFacts, Tokenized
from halfbyte.errors import OutputError

ROWS, FACTS, REPORT = "rows.arrow", "facts.npz", "report.json"
VERSION = 1  # of the files, and of how rows are made: part of every name
_BATCH_TOKENS = 1 << 20

Build = Callable[[Path], None]


def key_of(**parts: Any) -> str:
    """The name of a data set that is made from `parts`, which are turned into JSON."""
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()[:32]


def stored(cache: Path | None, key: str, build: Build) -> Tokenized:
    """The data set of that name, built where it is missing.

    Args:
        cache: the folder of all data sets; None: nothing is kept, and the rows are held in memory.
        key: see `key_of`.
        build: writes the three files into a folder.

    Raises:
        OutputError: the cache cannot be written.
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            return _open(Path(folder), key, in_memory=True)
    place = cache / key
    while not hold(place / REPORT):
        _make(cache, place, build)
    evict(cache, REPORT, env.cache_limit())
    return _open(place, key, in_memory=False)


def _make(cache: Path, place: Path, build: Build) -> None:
    """Build aside, and rename."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=BUILDING, dir=cache))
    except OSError as error:
        raise OutputError(
            f"the token cache {cache} cannot be written ({error.strerror}); name another by HALFBYTE_CACHE."
        ) from error
    try:
        build(aside)
        aside.rename(place)
    except OSError as error:
        if not (place / REPORT).is_file():  # else another process was faster, and its files are the same
            raise OutputError(f"the token cache {cache} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open(folder: Path, key: str, *, in_memory: bool) -> Tokenized:
    from datasets import Dataset

    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    with np.load(folder / FACTS, allow_pickle=False) as arrays:
        facts = RowFacts(**{field.name: arrays[field.name] for field in fields(RowFacts)})
    dataset = Dataset.from_file(str(folder / ROWS), in_memory=in_memory)
    return Tokenized(dataset, LengthReport(**{**report, "notes": tuple(report["notes"])}), facts, key)


def write_facts(folder: Path, report: LengthReport, facts: RowFacts) -> None:
    """Write what stands beside the rows."""
    np.savez(folder / FACTS, **{field.name: getattr(facts, field.name) for field in fields(RowFacts)})
    (folder / REPORT).write_text(json.dumps(report.as_dict()), encoding="utf-8")


class RowWriter:
    """Writes rows of several int32 columns, which are equally long in each row, as an Arrow stream.

    Args:
        folder: where the file is made.
        columns: their names.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        import pyarrow as pa

        self._columns = tuple(columns)
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in columns])
        self._file = pa.OSFile(str(folder / ROWS), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._lengths: list[np.ndarray] = []
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        self._waiting = 0

    def write(self, lengths: np.ndarray, **values: np.ndarray) -> None:
        """Add rows: their lengths, and the values of each column one after the other."""
        self._lengths.append(lengths)
        for name in self._columns:
            self._values[name].append(values[name])
        self._waiting += len(values[self._columns[0]])
        if self._waiting >= _BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._lengths:
            return
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))]).astype(np.int32)
        arrays = [
            pa.ListArray.from_arrays(offsets, np.concatenate(self._values[name]).astype(np.int32, copy=False))
            for name in self._columns
        ]
        self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._lengths.clear()
        for waiting in self._values.values():
            waiting.clear()
        self._waiting = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._stream.close()
        self._file.close()


class RowReader:
    """Random access to the int32 columns of a stored data set, without a copy."""

    def __init__(self, tokenized: Tokenized, columns: Sequence[str]) -> None:
        table = tokenized.dataset.data.table
        self._columns = tuple(columns)
        self._chunks = []
        for batch in table.to_batches():
            lists = [batch.column(name) for name in columns]
            offsets = lists[0].offsets.to_numpy()
            self._chunks.append((offsets, [column.values.to_numpy() for column in lists]))
        self._starts = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self._chunks])

    def row(self, index: int) -> list[np.ndarray]:
        """The values of each column in a row, views of the file."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, columns = self._chunks[chunk]
        at = index - int(self._starts[chunk])
        return [values[offsets[at] : offsets[at + 1]] for values in columns]
