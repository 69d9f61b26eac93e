"""Bad rows, collected: a person who mends one row should not have to start again to hear of the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from halfbyte.errors import DataError

SHOWN = 10  # sentences before the rest is only counted


class Problems:
    """What is wrong with the rows of a data set: the first `SHOWN` in words, all of them counted.

    Attributes:
        first: one sentence each.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0
        self._raise = False

    @classmethod
    def raising(cls) -> Problems:
        """One that raises the first problem at once, for a single row."""
        problems = cls()
        problems._raise = True
        return problems

    def add(self, sentence: str) -> None:
        """One more."""
        if self._raise:
            raise DataError(sentence)
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(sentence)

    def extend(self, first: Iterable[str], count: int) -> None:
        """What another collector has found."""
        self.first = [*self.first, *first][:SHOWN]
        self.count += count

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add the `DataError` that the block raises, and go on after it."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise what was found.

        Raises:
            DataError: one line for each of the first problems, then the number of the others.
        """
        if self.count:
            others = self.count - len(self.first)
            rest = [f"... and {others:,} more bad row{'s' if others > 1 else ''}."] if others else []
            raise DataError("\n".join([*self.first, *rest]))
