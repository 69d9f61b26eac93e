"""Rows into examples: which columns mean what.

The layouts people have, all of them recognised by their columns:

| layout     | columns                                                                      | becomes  |
|---|---|---|
| messages   | `messages`: [{role, content}, ...], with `tool_calls` and role `tool`        | messages |
| ShareGPT   | `conversations`: [{from, value}, ...], with `function_call` and `observation` | messages |
| Alpaca     | `instruction`, `output`, optional `input`, `history` ([[question, answer]])  | messages |
| completion | `prompt`, `completion` (strings, or lists of messages)                       | messages |
| text       | `text`                                                                       | text     |

All but text may have `system`, and `tools`: a list of tool descriptions, or JSON of one. The first row of a file
decides, and every other row must agree: a row that lacks a column which its neighbours have is a mistake in the file,
and guessing a second layout for it would hide that. Columns not named here are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from halfbyte.data.examples import Examples, SourceLike, read_sources
from halfbyte.data.read import Row
from halfbyte.data.turns import Conversation, Message, as_turns, string_of, system_of, tools_of
from halfbyte.errors import DataError


@dataclass(frozen=True)
class Example:
    """What one row teaches: a conversation, or a plain text. Exactly one of the two is set.

    Attributes:
        where: the file and line it came from, for messages.
        messages: role and content of each turn; at least one turn is the assistant's.
        text: plain text.
        tools: descriptions of the tools, as chat templates take them.
        prompt_turns: how many turns at the start are given and no answers to learn, whoever said them.
        unweighted: indices of turns that the row itself says are not to be learnt (`weight: 0`).
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    prompt_turns: int = 0
    unweighted: frozenset[int] = field(default_factory=frozenset)


def read_examples(sources: Iterable[SourceLike] | SourceLike, *, seed: int = 0) -> Examples[Example]:
    """Read and check files, folders and hub data sets of conversations and plain texts; see `read_sources`.

    Raises:
        DataError: see `read_sources`; or a row lacks something, with file, line and what is missing.
    """
    return read_sources(sources, _recognise, seed=seed)


def _recognise(row: Row) -> Callable[[Row], Example]:
    """The first layout whose needed columns the row has."""
    layout = match_layout(row, {name: needed for name, (needed, _) in _LAYOUTS.items()})
    needed, to_example = _LAYOUTS[layout]

    def parse(row: Row) -> Example:
        check_columns(row, needed, layout)
        return to_example(row)

    return parse


def match_layout(row: Row, layouts: dict[str, tuple[str, ...]]) -> str:
    """The name of the first layout whose needed columns are all in the row.

    Raises:
        DataError: there is none; the message names what is missing from the one that comes near.
    """
    present = list(row.columns)
    for layout, needed in layouts.items():
        if all(column in row.columns for column in needed):
            return layout
    lacking = {layout: [c for c in needed if c not in present] for layout, needed in layouts.items()}
    near = [layout for layout, needed in layouts.items() if len(lacking[layout]) < len(needed)]
    if near:
        nearest_layout = min(near, key=lambda layout: len(lacking[layout]))
        missing = ", ".join(map(repr, lacking[nearest_layout]))
        raise DataError(f"{row.where}: the column {missing} is missing, which {nearest_layout} data needs.")
    offered = " | ".join("+".join(needed) for needed in layouts.values())
    raise DataError(f"{row.where}: the columns {', '.join(present) or '(none)'} fit no known layout; give {offered}.")


def check_columns(row: Row, needed: Iterable[str], layout: str) -> None:
    """Raise a `DataError` for the first needed column that the row lacks."""
    for column in needed:
        if row.columns.get(column) is None:
            raise DataError(f"{row.where}: the column {column!r} is missing, which {layout} data needs.")


def _of(row: Row, conversation: Conversation, prompt_turns: int = 0) -> Example:
    """A conversation as an example, checked for an answer."""
    messages, unweighted = conversation.messages, conversation.unweighted
    learnt = (
        message["role"] == "assistant" and (message.get("tool_calls") or message["content"].strip())
        for index, message in enumerate(messages)
        if index >= prompt_turns and index not in unweighted
    )
    if not any(learnt):
        pairs = "; its answers are a chosen and a rejected one, which is data for preference learning"
        hint = pairs if "chosen" in row.columns and "rejected" in row.columns else ""
        raise DataError(f"{row.where}: there is no answer to learn from (no assistant turn with content){hint}.")
    return Example(
        row.where,
        messages=tuple(messages),
        tools=tools_of(row),
        prompt_turns=prompt_turns,
        unweighted=frozenset(unweighted),
    )


def _from_messages(row: Row) -> Example:
    return _of(row, system_of(row) + as_turns(row, "messages", row.columns["messages"]))


def _from_sharegpt(row: Row) -> Example:
    return _of(row, system_of(row) + as_turns(row, "conversations", row.columns["conversations"]))


def _from_alpaca(row: Row) -> Example:
    question = alpaca_prompt(row)
    return _of(row, question + Conversation.of("assistant", string_of(row, "output")))


def alpaca_prompt(row: Row) -> Conversation:
    """All of an Alpaca row but its answer."""
    extra = string_of(row, "input") if row.columns.get("input") else ""
    question = string_of(row, "instruction") + (f"\n\n{extra}" if extra else "")
    conversation = system_of(row)
    history = row.columns.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{row.where}: the column 'history' must be a list of [question, answer] pairs.")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            raise DataError(f"{row.where}: history[{index}] must be a pair of texts, [question, answer].")
        conversation += Conversation.of("user", pair[0]) + Conversation.of("assistant", pair[1])
    return conversation + Conversation.of("user", question)


def _from_completion(row: Row) -> Example:
    prompt = prompt_of(row)
    completion = row.columns["completion"]
    if isinstance(completion, list):
        answer = as_turns(row, "completion", completion)
    else:
        answer = Conversation.of("assistant", string_of(row, "completion"))
    return _of(row, prompt + answer, prompt_turns=len(prompt.messages))


def prompt_of(row: Row) -> Conversation:
    """The column `prompt`, a text or a list of messages, behind the system prompt."""
    prompt = row.columns["prompt"]
    if isinstance(prompt, list):
        return system_of(row) + as_turns(row, "prompt", prompt)
    return system_of(row) + Conversation.of("user", string_of(row, "prompt"))


def _from_text(row: Row) -> Example:
    text = string_of(row, "text")
    if not text.strip():
        raise DataError(f"{row.where}: the column 'text' is empty.")
    return Example(row.where, text=text)


# Order matters: the first whose needed columns are all there wins, so the more telling columns come first.
_LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "messages": (("messages",), _from_messages),
    "ShareGPT": (("conversations",), _from_sharegpt),
    "Alpaca": (("instruction", "output"), _from_alpaca),
    "completion": (("prompt", "completion"), _from_completion),
    "text": (("text",), _from_text),
}
