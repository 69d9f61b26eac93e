"""Pairs of answers to one prompt, a better and a worse one, into rows of token ids.

Each answer becomes the conversation that it ends, rendered as for supervised fine-tuning, with labels on the tokens of
the answer only: what the two have in common cancels in the difference of their log-probabilities anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data import IGNORE, Example, LengthReport, Renderer, Tokenized, pad_rows
from halfbyte.data.conversations import ROLES
from halfbyte.data.read import Row, read_rows
from halfbyte.errors import DataError

if TYPE_CHECKING:
    import torch

Message = dict[str, str]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        where: the file and line it came from.
        prompt: the turns before the answer.
        chosen: the better answer, turns that end with the assistant's; `rejected`: the worse one.
    """

    where: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def read_pairs(paths: Iterable[str | Path]) -> list[Pair]:
    """Read data files of `conversations` (or `prompt`), `chosen` and `rejected`.

    Raises:
        DataError: see `read_rows`; or a row lacks a column, with file, line and what is missing.
    """
    return [_pair(row) for path in paths for row in read_rows(path)]


def _pair(row: Row) -> Pair:
    found = {name: row.columns.get(name) for name in ("conversations", "prompt", *SIDES)}
    prompt = found["conversations"] or found["prompt"]
    for name, value in (("prompt", prompt), ("chosen", found["chosen"]), ("rejected", found["rejected"])):
        if not value:
            raise DataError(f"{row.where}: the column {name!r} is missing or empty.")
    return Pair(
        row.where, *(_turns(prompt, "user", row.where), *(_turns(found[s], "assistant", row.where) for s in SIDES))
    )


def _turns(value: Any, role: str, where: str) -> tuple[Message, ...]:
    """A text of that role, a turn, or a list of turns."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    try:
        turns = [value] if isinstance(value, dict) else value
        pairs = [(turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"]) for turn in turns]
        return tuple({"role": ROLES[name], "content": content} for name, content in pairs)
    except (KeyError, TypeError):
        raise DataError(f"{where}: a turn is not of the form {{role, content}} or {{from, value}}.") from None


def tokenize_pairs(pairs: Sequence[Pair], renderer: Renderer, *, max_length: int) -> Tokenized:
    """Rows of `chosen_ids`, `chosen_labels`, `rejected_ids` and `rejected_labels`.

    Args:
        pairs: what was read.
        renderer: the renderer of the model's tokenizer.
        max_length: tokens of the longer side; what is beyond is cut, and a pair of which an answer is cut off whole
            is dropped.

    Raises:
        DataError: a row has no token to train on, or no row is left.
    """
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {f"{side}_{kind}": [] for side in SIDES for kind in ("ids", "labels")}
    cut = dropped = longest = 0
    for pair in pairs:
        sides = {side: _side(pair, getattr(pair, side), renderer) for side in SIDES}
        length = max(len(ids) for ids, _ in sides.values())
        longest = max(longest, length)
        if any(_count(labels[:max_length]) == 0 for _, labels in sides.values()):
            dropped += 1
            continue
        cut += length > max_length
        for side, (ids, labels) in sides.items():
            columns[f"{side}_ids"].append(ids[:max_length])
            columns[f"{side}_labels"].append(labels[:max_length])
    rows = len(columns["chosen_ids"])
    if not rows:
        raise DataError(f"no pair is left to train on: all {dropped} have an answer beyond max_length {max_length}.")
    report = LengthReport(
        rows=rows,
        cut=cut,
        dropped=dropped,
        tokens=sum(len(ids) for side in SIDES for ids in columns[f"{side}_ids"]),
        trained=sum(_count(labels) for side in SIDES for labels in columns[f"{side}_labels"]),
        longest=longest,
    )
    return Tokenized(Dataset.from_dict(columns), report)


def _side(pair: Pair, answer: tuple[Message, ...], renderer: Renderer) -> tuple[list[int], list[int]]:
    """Ids and labels of the conversation that ends with one answer."""
    messages = (*pair.prompt, *answer)
    ids, trained = renderer.training_ids(Example(pair.where, messages).messages, pair.where)
    prompt = renderer.ids(pair.prompt, prompt=True)
    start = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
    labels = [
        token if on and index >= start else IGNORE for index, (token, on) in enumerate(zip(ids, trained, strict=True))
    ]
    if not _count(labels):
        raise DataError(f"{pair.where}: no token of an answer would be trained on; it renders to nothing.")
    return ids, labels


def _count(labels: Sequence[int]) -> int:
    return sum(label != IGNORE for label in labels[1:])  # the first of a row is never predicted


def collate_pairs(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """trl's layout of a batch: the chosen sides, then the rejected ones.

    Args:
        rows: as `tokenize_pairs` makes them, perhaps with `ref_chosen_logps` and `ref_rejected_logps`.
        pad_id: any token id.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (1 where a token is trained), int64 [2 rows, longest];
        `ref_chosen_logps` and `ref_rejected_logps`, float32 [rows], where rows have them.
    """
    import torch

    sides = [{"input_ids": row[f"{side}_ids"], "labels": row[f"{side}_labels"]} for side in SIDES for row in rows]
    batch = pad_rows(sides, pad_id)
    batch["completion_mask"] = (batch.pop("labels") != IGNORE).long()
    for side in SIDES:
        if f"ref_{side}_logps" in rows[0]:
            batch[f"ref_{side}_logps"] = torch.tensor([row[f"ref_{side}_logps"] for row in rows])
    return batch
