"""Every error halfbyte raises on purpose, in one tree.

The tree answers the one question a caller has: *whose fault is it?* A `RequestError` means that what was asked for is
wrong (a missing file, an unknown key, a damaged checkpoint): the command line prints its sentence and exits with 2. A
`WorkError` means that the request was fine and the work failed (a loss that is not finite): exit code 1. Anything else
that escapes is a bug and keeps its traceback.

Messages are one sentence that names the thing and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 1000  # characters of a message that quotes a file


class HalfbyteError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class WorkError(HalfbyteError):
    """The request was right and the work failed."""


class NonFiniteError(WorkError):
    """A number that must be finite (a loss, a gradient) was not; the message names the first tensor."""


class StoppedError(WorkError):
    """Somebody stopped the work, and it can be gone on with.

    Args:
        message: how.
        exit_code: what a shell expects of a program that a signal has ended.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ProcessError(WorkError):
    """Another process of the same run has failed.

    Args:
        message: which one, and its message.
        exit_code: its exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BusyError(WorkError):
    """There is no room for the request now, and there may be later."""


class RequestError(HalfbyteError, ValueError):
    """The request was wrong; nothing was changed and nothing is half-written."""

    exit_code = 2


class FormatError(RequestError):
    """A number format, block size or scale width that is not offered, or a tensor that cannot be encoded."""


class ShapeError(RequestError):
    """Shapes that do not go together, or a view that packed storage cannot express."""


class CheckpointError(RequestError):
    """A model folder that is missing, incomplete, damaged, or not what it says it is.

    A message quotes what files say of themselves, which may be anything: what cannot be printed is escaped, and the
    middle of a long one is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}")


class DataError(RequestError):
    """A data file or row that cannot be used; the message gives file, row and what is missing."""


class OutputError(RequestError):
    """An output place that cannot be written: not empty, no permission, disk full."""


class RecipeError(RequestError):
    """All mistakes of a recipe at once, one line each.

    Args:
        source: the recipe's file name, or "recipe" when it came from Python.
        mistakes: one sentence per mistake.
    """

    def __init__(self, source: str, mistakes: Iterable[str]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("\n".join(f"{source}: {mistake}" for mistake in self.mistakes))


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint to end a message with: the choice that `word` most likely meant, or all of them when none is near."""
    offered = [str(choice) for choice in choices]
    match = difflib.get_close_matches(str(word), offered, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else "choose one of: " + ", ".join(offered)
