"""Turns of a conversation: roles, contents and tool calls, brought to the one spelling that chat templates take.

| written as                                             | becomes                                        |
|---|---|
| `from`/`value` (ShareGPT), `role`/`content`            | `role`, `content`                              |
| `human`, `gpt`, `model`, `observation`, ...            | `user`, `assistant`, `assistant`, `tool`       |
| content as a list of text parts                        | one text                                       |
| a turn `function_call` whose value is JSON             | an assistant turn with `tool_calls`            |
| a call or tool without its `{"type": "function"}` hull | the same with it                               |
| arguments as JSON text                                 | an object                                      |
| `weight` or `loss_weight` 0                            | the turn is not learnt                         |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.read import Row
from halfbyte.errors import DataError, nearest

Message = dict[str, Any]  # role and content; perhaps tool_calls and one of _KEPT
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content")  # what templates read besides
_WEIGHTS = ("weight", "loss_weight")


@dataclass(frozen=True)
class Conversation:
    """Turns, and which of them are not to be learnt."""

    messages: tuple[Message, ...] = ()
    unweighted: frozenset[int] = frozenset()

    @classmethod
    def of(cls, role: str, content: str) -> Conversation:
        """A single turn."""
        return cls(({"role": role, "content": content},))

    def __add__(self, other: Conversation) -> Conversation:
        behind = (index + len(self.messages) for index in other.unweighted)
        return Conversation(self.messages + other.messages, self.unweighted.union(behind))


def string_of(row: Row, column: str) -> str:
    """A column that must be text."""
    value = row.columns[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: the column {column!r} must be text, it is a {type(value).__name__}.")
    return value


def system_of(row: Row) -> Conversation:
    """The column `system`, if there is one."""
    return Conversation.of("system", string_of(row, "system")) if row.columns.get("system") else Conversation()


def tools_of(row: Row) -> tuple[dict[str, Any], ...]:
    """The column `tools`, if there is one: a list of tools, or JSON of one.

    Raises:
        DataError: it is something else, or a tool has no name.
    """
    tools = row.columns.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, f"{row.where}: the column 'tools'") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise DataError(f"{row.where}: the column 'tools' must be a list of tools, it is a {type(tools).__name__}.")
    return tuple(_in_hull(tool, f"{row.where}: tools[{index}]") for index, tool in enumerate(tools))


def as_turns(row: Row, column: str, turns: Any) -> Conversation:
    """A list of turns in either spelling, checked.

    Raises:
        DataError: the list is none or empty, or a turn lacks something; the message gives its index.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.where}: the column {column!r} must be a list of turns that is not empty.")
    messages: list[Message] = []
    unweighted = set()
    for index, turn in enumerate(turns):
        here = f"{row.where}: {column}[{index}]"
        messages.append(as_turn(turn, here))
        weight = next((turn[key] for key in _WEIGHTS if turn.get(key) is not None), 1)
        if weight not in (0, 1):
            raise DataError(f"{here} has the weight {weight!r}; a turn is learnt (1) or not (0).")
        if weight == 0:
            unweighted.add(index)
    return Conversation(tuple(messages), frozenset(unweighted))


def as_turn(turn: Any, here: str) -> Message:
    """One turn in either spelling, checked; `here` begins a message about it."""
    if not isinstance(turn, dict):
        raise DataError(f"{here} must be an object with a role and a content, it is a {type(turn).__name__}.")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if turn.get(role_key) is None:
        raise DataError(f"{here} lacks {role_key!r}.")
    spelled = str(turn[role_key])
    role = ROLES.get(spelled)
    if role is None:
        raise DataError(f"{here} has the role {spelled!r}; {nearest(spelled, ROLES)}.")
    content, calls = turn.get(content_key), turn.get("tool_calls")
    if content is None and not calls:
        raise DataError(f"{here} lacks {content_key!r}.")
    text = "" if content is None else _content(content, here)
    if spelled == "function_call":
        parsed = _json(text, f"{here} (function_call)")
        text, calls = "", parsed if isinstance(parsed, list) else [parsed]
    message: Message = {"role": role, "content": text}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DataError(f"{here} has tool_calls that are not a list of calls of the assistant.")
        message["tool_calls"] = [_in_hull(call, f"{here}.tool_calls[{n}]") for n, call in enumerate(calls)]
    message.update({key: turn[key] for key in _KEPT if turn.get(key) is not None})
    return message


def _content(content: Any, here: str) -> str:
    """A turn's content: a string, or a list of text parts as vision-language data sets write it."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") if part.get("text") is not None else part.get("value") for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    raise DataError(f"{here} has content that is neither text nor a list of text parts.")


def _in_hull(call: Any, here: str) -> dict[str, Any]:
    """A tool or a call as `{"type": "function", "function": {...}}`, without empty fields."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(f"{here} has no 'name'.")
    inner = {key: value for key, value in inner.items() if value is not None}
    if isinstance(inner.get("arguments"), str):
        inner["arguments"] = _json(inner["arguments"] or "{}", f"{here}.arguments")
    hull = {key: call[key] for key in ("id",) if call.get(key) is not None} if inner is not call else {}
    return {**hull, "type": "function", "function": inner}


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is not JSON ({error.msg}, column {error.colno}).") from error


def calls_as_text(calls: Sequence[dict[str, Any]]) -> str:
    """Tool calls as JSON, one a line: what a model learns to write where its template knows no tool calls."""
    return "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)
