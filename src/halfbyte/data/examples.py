"""Rows of several sources as one sequence of examples, read as a stream.

A data set may be larger than memory, so what is held is where its rows are and which of them are used, a few bytes for
each, and iterating reads the files again. The first reading checks every row.

**Weights** are shares of the rows of a pass: with `{a: 0.7, b: 0.3}` seven rows of ten come from `a`. No row is used
twice: the source that is scarcest for its weight is used whole, and from the others as many rows are drawn as fit to
it (as `datasets.interleave_datasets` does by default). Without weights every row is used once.

**What is drawn depends on the seed and the number of rows alone**, not on a library's version: the order is that of
Philox's raw numbers, which NumPy promises to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from halfbyte.data.problems import Problems
from halfbyte.data.read import Row
from halfbyte.data.sources import Source, Table, open_tables
from halfbyte.errors import DataError

T = TypeVar("T")
Parser = Callable[[Row], T]  # a row becomes an example
Recogniser = Callable[[Row], Parser[T]]  # from the first row of a file, how its rows are to be understood
SourceLike = str | Path | Source

_MIX, _SPLIT = 1, 2  # two purposes, two streams of random numbers from one seed


@dataclass(frozen=True)
class _Part:
    """One table and which of its rows are used, ascending; None: all."""

    table: Table
    rows: int
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return self.rows if self.chosen is None else len(self.chosen)

    def take(self, positions: np.ndarray) -> _Part:
        """Those of the used rows that stand at `positions`, ascending."""
        return replace(self, chosen=positions if self.chosen is None else self.chosen[positions])


class Examples(Collection[T]):
    """A sequence of examples that is read from its files each time it is iterated over."""

    def __init__(self, parts: Sequence[_Part], recognise: Recogniser[T]) -> None:
        self._parts = tuple(part for part in parts if len(part))
        self._recognise = recognise

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __iter__(self) -> Iterator[T]:
        problems = Problems()
        for part in self._parts:
            wanted = None if part.chosen is None else iter(part.chosen.tolist())
            at = None if wanted is None else next(wanted)
            for number, example in _parsed(part.table, self._recognise, problems):
                if wanted is None:
                    yield example
                elif number == at:
                    yield example
                    at = next(wanted, None)
                    if at is None:
                        break
        problems.check()  # none, unless a file was changed since it was checked

    def __contains__(self, example: object) -> bool:
        return any(example == one for one in self)

    @property
    def used(self) -> dict[str, tuple[int, int]]:
        """Of each file, how many of its rows are used, and how many it has."""
        return {part.table.name: (len(part), part.rows) for part in self._parts}

    @property
    def digests(self) -> dict[str, str]:
        """Of each file, a hash of its content."""
        return {part.table.name: part.table.digest for part in self._parts}

    @property
    def digest(self) -> str:
        """SHA-256 over the content of the files and the choice of their rows: equal digests mean equal examples."""
        content = hashlib.sha256()
        for part in self._parts:
            content.update(part.table.digest.encode())
            content.update(b"all" if part.chosen is None else part.chosen.astype("<i8").tobytes())
        return content.hexdigest()

    def take(self, positions: Iterable[int]) -> Examples[T]:
        """The examples at `positions`, in the order of the files."""
        wanted = np.unique(np.fromiter(positions, dtype=np.int64))
        parts, start = [], 0
        for part in self._parts:
            inside = wanted[(wanted >= start) & (wanted < start + len(part))]
            parts.append(part.take(inside - start))
            start += len(part)
        return Examples(parts, self._recognise)

    def split(self, held_out: float | int, seed: int) -> tuple[Examples[T], Examples[T]]:
        """Examples to train on, and examples to measure on.

        Args:
            held_out: how many to measure on; below 1, their share (at least one).
            seed: equal seeds and data give equal splits.

        Raises:
            DataError: nothing would be left to train on.
        """
        count = max(1, round(held_out * len(self))) if held_out < 1 else int(held_out)
        if count >= len(self):
            raise DataError(
                f"eval_split {held_out} leaves nothing to train on: there {_are(len(self))}; "
                "choose fewer, or name an eval_dataset."
            )
        order = _shuffled(len(self), seed, _SPLIT)
        return self.take(order[count:]), self.take(order[:count])


def read_sources(sources: Iterable[SourceLike] | SourceLike, recognise: Recogniser[T], *, seed: int = 0) -> Examples[T]:
    """Read and check every row of the sources, and mix them by their weights.

    Args:
        sources: files, folders and data sets, in order; see `Source`.
        recognise: takes the first row of a file and returns what turns its rows into examples.
        seed: decides which rows of a source are drawn where it is larger than its weight asks for.

    Raises:
        DataError: the first bad rows of all files, one sentence each, and the number of the others.
    """
    if isinstance(sources, str | Path | Source):
        sources = [sources]
    listed = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
    problems = Problems()
    groups: list[list[_Part]] = []
    for source in listed:
        parts: list[_Part] = []
        with problems.collect():
            for table in open_tables(source):
                with problems.collect():
                    parts.append(_Part(table, sum(1 for _ in _parsed(table, recognise, problems))))
        groups.append(parts)
    problems.check()
    return Examples(list(chain.from_iterable(_mix(listed, groups, seed))), recognise)


def _parsed(table: Table, recognise: Recogniser[T], problems: Problems) -> Iterator[tuple[int, T]]:
    """Number and example of each good row of a table; a first row of no known layout ends it."""
    parse: Parser[T] | None = None
    for number, row in enumerate(table.rows(problems)):
        if parse is None:
            parse = recognise(row)
        try:
            example = parse(row)
        except DataError as error:
            problems.add(str(error))
            continue
        yield number, example


def _mix(sources: Sequence[Source], groups: Sequence[list[_Part]], seed: int) -> list[list[_Part]]:
    """The parts of each source, reduced to its share."""
    if all(source.weight is None for source in sources):
        return list(groups)
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    totals = [sum(len(part) for part in parts) for parts in groups]
    scale = min(total / weight for total, weight in zip(totals, weights, strict=True) if weight)
    mixed = []
    for index, (parts, weight, total) in enumerate(zip(groups, weights, totals, strict=True)):
        # 1e-9: a share of exactly n rows must not become n - 1 by rounding
        drawn = np.sort(_shuffled(total, seed, _MIX + 16 * (index + 1))[: int(scale * weight + 1e-9)])
        start, kept = 0, []
        for part in parts:
            kept.append(part.take(drawn[(drawn >= start) & (drawn < start + len(part))] - start))
            start += len(part)
        mixed.append(kept)
    return mixed


def _shuffled(count: int, seed: int, purpose: int) -> np.ndarray:
    """The numbers below `count` in an order that the seed decides."""
    numbers = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")


def _are(count: int) -> str:
    return "is 1 row" if count == 1 else f"are {count:,} rows"
