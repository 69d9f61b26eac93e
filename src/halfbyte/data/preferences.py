"""Rows into preferences: which of two answers is better, or whether one is good.

| layout          | columns                                                                   | becomes    |
|---|---|---|
| ShareGPT        | `conversations`, `chosen`, `rejected` (a turn, a list of turns, a text)   | a pair     |
| Alpaca          | `instruction`, `chosen`, `rejected`, optional `input`, `history`          | a pair     |
| prompt          | `prompt`, `chosen`, `rejected` (texts, or lists of messages)              | a pair     |
| whole           | `chosen`, `rejected`: lists of messages that begin alike                  | a pair     |
| judged messages | `messages`, `label` (true or false)                                       | a judgment |
| judged answer   | `prompt`, `completion`, `label`                                           | a judgment |

As everywhere, `system` and `tools` are optional, and the first row of a file decides its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from halfbyte.data.conversations import alpaca_prompt, check_columns, match_layout, prompt_of
from halfbyte.data.examples import Examples, SourceLike, read_sources
from halfbyte.data.read import Row
from halfbyte.data.turns import Conversation, Message, as_turn, as_turns, string_of, system_of, tools_of
from halfbyte.errors import DataError


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        where: the file and line it came from.
        prompt: the turns before the answer.
        chosen: the better answer, turns that end with the assistant's; `rejected`: the worse one.
        tools: descriptions of the tools.
    """

    where: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Judgment:
    """One answer to a prompt, and whether it is good.

    Attributes:
        where: the file and line it came from.
        prompt: the turns before the answer; `completion`: the answer.
        label: whether it is good.
        tools: descriptions of the tools.
    """

    where: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[dict[str, Any], ...] = ()


def read_preferences(sources: Iterable[SourceLike] | SourceLike, *, seed: int = 0) -> Examples[Preference]:
    """Read and check pairs of a chosen and a rejected answer; see `read_sources`.

    Raises:
        DataError: see `read_sources`; or a row lacks something, with file, line and what is missing.
    """
    return read_sources(sources, lambda row: _recognise(row, _PAIRS), seed=seed)


def read_judgments(sources: Iterable[SourceLike] | SourceLike, *, seed: int = 0) -> Examples[Judgment]:
    """Read and check answers that are labelled good or bad; see `read_sources`.

    Raises:
        DataError: see `read_sources`; or a row lacks something, with file, line and what is missing.
    """
    return read_sources(sources, lambda row: _recognise(row, _JUDGED), seed=seed)


def _recognise(row: Row, layouts: dict[str, tuple[tuple[str, ...], Callable[[Row], Any]]]) -> Callable[[Row], Any]:
    layout = match_layout(row, {name: needed for name, (needed, _) in layouts.items()})
    needed, parse = layouts[layout]

    def checked(row: Row) -> Any:
        check_columns(row, needed, f"{layout} preference")
        return parse(row)

    return checked


def _pair(row: Row, prompt: Conversation) -> Preference:
    chosen, rejected = (_answer(row, column) for column in ("chosen", "rejected"))
    if not prompt.messages:
        raise DataError(f"{row.where}: there is no prompt before the answers.")
    return Preference(row.where, prompt.messages, chosen, rejected, tools_of(row))


def _answer(row: Row, column: str) -> tuple[Message, ...]:
    """One side of a pair: a text, a turn, or a list of turns, that ends with the assistant's."""
    value = row.columns[column]
    if isinstance(value, str):
        turns: tuple[Message, ...] = ({"role": "assistant", "content": value},)
    elif isinstance(value, dict):
        turns = (as_turn(value, f"{row.where}: the column {column!r}"),)
    else:
        turns = as_turns(row, column, value).messages
    last = turns[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"{row.where}: the column {column!r} must end with the assistant's turn, not the {last['role']}'s."
        )
    if not last["content"].strip() and not last.get("tool_calls"):
        raise DataError(f"{row.where}: the column {column!r} holds an empty answer.")
    return turns


def _from_sharegpt(row: Row) -> Preference:
    return _pair(row, system_of(row) + as_turns(row, "conversations", row.columns["conversations"]))


def _from_whole(row: Row) -> Preference:
    """The prompt is what both conversations begin with."""
    sides = []
    for column in ("chosen", "rejected"):
        if not isinstance(row.columns[column], list):
            raise DataError(f"{row.where}: without a prompt the column {column!r} must be a list of turns.")
        sides.append(_answer(row, column))
    shared = 0
    while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    prompt = system_of(row).messages + sides[0][:shared]
    if not prompt:
        raise DataError(f"{row.where}: chosen and rejected have no turn in common, so there is no prompt.")
    return Preference(row.where, prompt, sides[0][shared:], sides[1][shared:], tools_of(row))


def _judged(row: Row, conversation: Conversation) -> Judgment:
    label = _LABELS.get(str(row.columns["label"]).lower())
    if label is None:
        raise DataError(f"{row.where}: the column 'label' must be true or false, it is {row.columns['label']!r}.")
    *prompt, answer = conversation.messages
    if not prompt or answer["role"] != "assistant":
        raise DataError(f"{row.where}: a judged conversation must be a prompt that ends with the assistant's answer.")
    if not answer["content"].strip() and not answer.get("tool_calls"):
        raise DataError(f"{row.where}: the answer is empty.")
    return Judgment(row.where, tuple(prompt), (answer,), label, tools_of(row))


def _judged_messages(row: Row) -> Judgment:
    return _judged(row, system_of(row) + as_turns(row, "messages", row.columns["messages"]))


def _judged_answer(row: Row) -> Judgment:
    completion = row.columns["completion"]
    if isinstance(completion, list):
        return _judged(row, prompt_of(row) + as_turns(row, "completion", completion))
    return _judged(row, prompt_of(row) + Conversation.of("assistant", string_of(row, "completion")))


_LABELS = {"true": True, "1": True, "false": False, "0": False}  # a table has only texts
_PAIRS: dict[str, tuple[tuple[str, ...], Callable[[Row], Preference]]] = {
    "ShareGPT": (("conversations", "chosen", "rejected"), _from_sharegpt),
    "Alpaca": (("instruction", "chosen", "rejected"), lambda row: _pair(row, alpaca_prompt(row))),
    "prompt": (("prompt", "chosen", "rejected"), lambda row: _pair(row, prompt_of(row))),
    "whole": (("chosen", "rejected"), _from_whole),
}
_JUDGED: dict[str, tuple[tuple[str, ...], Callable[[Row], Judgment]]] = {
    "judged messages": (("messages", "label"), _judged_messages),
    "judged answer": (("prompt", "completion", "label"), _judged_answer),
}
