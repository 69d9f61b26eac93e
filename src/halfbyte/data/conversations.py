"""Rows into examples: which columns mean what.

The layouts people have, all of them recognised by their columns:

| layout     | columns                                                        | becomes  |
|---|---|---|
| messages   | `messages`: [{role, content}, ...]                             | messages |
| ShareGPT   | `conversations`: [{from, value}, ...], optional `system`       | messages |
| Alpaca     | `instruction`, `output`, optional `input`, optional `system`   | messages |
| completion | `prompt`, `completion` (strings, or lists of messages)         | messages |
| text       | `text`                                                         | text     |

The first row of a file decides, and every other row must agree: a row that lacks a column which its neighbours have is
a mistake in the file, and guessing a second layout for it would hide that. Columns not named here are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.read import Row, read_rows
from halfbyte.errors import DataError, nearest

Message = dict[str, str]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Example:
    """What one row teaches: a conversation, or a plain text. Exactly one of the two is set.

    Attributes:
        where: the file and line it came from, for messages.
        messages: role and content of each turn; at least one turn is the assistant's.
        text: plain text.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""


def read_examples(paths: Iterable[str | Path]) -> list[Example]:
    """Read data files into examples, in order.

    Raises:
        DataError: see `read_rows`; or a row lacks a column, with file, line and what is missing.
    """
    examples: list[Example] = []
    for path in paths:
        rows = read_rows(path)
        layout = _recognise(rows[0])
        examples.extend(_example(row, layout) for row in rows)
    return examples


def _recognise(row: Row) -> str:
    """The first layout whose needed columns the row has."""
    for layout, (needed, _) in _LAYOUTS.items():
        if all(column in row.columns for column in needed):
            return layout
    present = list(row.columns)
    for layout, (needed, _) in _LAYOUTS.items():
        if any(column in present for column in needed):
            missing = ", ".join(repr(column) for column in needed if column not in present)
            raise DataError(f"{row.where}: the column {missing} is missing, which {layout} data needs.")
    offered = " | ".join("+".join(needed) for needed, _ in _LAYOUTS.values())
    raise DataError(f"{row.where}: the columns {', '.join(present) or '(none)'} fit no known layout; give {offered}.")


def _example(row: Row, layout: str) -> Example:
    needed, to_messages = _LAYOUTS[layout]
    for column in needed:
        if row.columns.get(column) is None:
            raise DataError(f"{row.where}: the column {column!r} is missing, which {layout} data needs.")
    if to_messages is None:
        text = _string(row, "text")
        if not text.strip():
            raise DataError(f"{row.where}: the column 'text' is empty.")
        return Example(row.where, text=text)
    messages = to_messages(row)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(f"{row.where}: there is no answer to learn from (no assistant turn with content).")
    return Example(row.where, messages=tuple(messages))


def _string(row: Row, column: str) -> str:
    value = row.columns[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: the column {column!r} must be text, it is a {type(value).__name__}.")
    return value


def _from_messages(row: Row) -> list[Message]:
    return _turns(row, "messages", "role", "content")


def _from_sharegpt(row: Row) -> list[Message]:
    return _system(row) + _turns(row, "conversations", "from", "value")


def _from_alpaca(row: Row) -> list[Message]:
    extra = _string(row, "input") if row.columns.get("input") else ""
    question = _string(row, "instruction") + (f"\n\n{extra}" if extra else "")
    return [*_system(row), _turn("user", question), _turn("assistant", _string(row, "output"))]


def _from_completion(row: Row) -> list[Message]:
    turns: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.columns[column], list):
            turns += _turns(row, column, "role", "content")
        else:
            turns.append(_turn(role, _string(row, column)))
    return turns


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(row: Row) -> list[Message]:
    return [_turn("system", _string(row, "system"))] if row.columns.get("system") else []


def _turns(row: Row, column: str, role_key: str, content_key: str) -> list[Message]:
    """A list of turns, with its roles and contents checked and brought to one spelling."""
    turns = row.columns[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: the column {column!r} must be a list of turns that is not empty.")
    messages = []
    for index, turn in enumerate(turns):
        here = f"{row.where}: {column}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(f"{here} must be an object with {role_key!r} and {content_key!r}.")
        for key in (role_key, content_key):
            if turn.get(key) is None:
                raise DataError(f"{here} lacks {key!r}.")
        role = ROLES.get(str(turn[role_key]))
        if role is None:
            raise DataError(f"{here} has the role {turn[role_key]!r}; {nearest(turn[role_key], ROLES)}.")
        messages.append(_turn(role, _content(turn[content_key], here)))
    return messages


def _content(content: Any, here: str) -> str:
    """A turn's content: a string, or a list of text parts as vision-language data sets write it."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text", part.get("value")) for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    raise DataError(f"{here} has content that is neither text nor a list of text parts.")


# Order matters: the first whose needed columns are all there wins, so the more telling columns come first.
# No way to messages means plain text.
_LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Row], list[Message]] | None]] = {
    "messages": (("messages",), _from_messages),
    "ShareGPT": (("conversations",), _from_sharegpt),
    "Alpaca": (("instruction", "output"), _from_alpaca),
    "completion": (("prompt", "completion"), _from_completion),
    "text": (("text",), None),
}
