"""Preferences and judgments into token ids, in the columns that trl's DPOTrainer and KTOTrainer collate.

A prompt and its answers are rendered together, as a supervised example is, and taken apart at the first token of the
answer: the prompt is what inference shows, and an answer ends on its end token and not on what a template writes behind
it. Where an answer is too long it loses its end; a row whose prompt leaves no room for an answer is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from halfbyte.data.conversations import Example
from halfbyte.data.lengths import RowFacts, Tokenized, fingerprint, length_report
from halfbyte.data.preferences import Judgment, Preference
from halfbyte.data.problems import Problems
from halfbyte.data.render import Renderer
from halfbyte.data.turns import Message
from halfbyte.errors import DataError

Halves = tuple[np.ndarray, np.ndarray]  # the prompt's tokens and the answer's


def tokenize_preferences(examples: Iterable[Preference], renderer: Renderer, *, max_length: int) -> Tokenized:
    """Turn pairs of answers into rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        examples: the pairs.
        renderer: the renderer of the model's tokenizer.
        max_length: tokens of a prompt and its longer answer.

    Raises:
        DataError: the first rows that cannot be rendered and the number of the others; or no row is left.
    """
    rows = _Rows(max_length)
    problems = Problems()
    same = 0
    for number, example in enumerate(examples):
        with problems.collect():
            chosen, rejected = (_halves(example, answer, renderer) for answer in (example.chosen, example.rejected))
            shared = _shared(chosen[0], rejected[0])
            answers = [np.concatenate([prompt[shared:], answer]) for prompt, answer in (chosen, rejected)]
            same += np.array_equal(answers[0], answers[1])
            rows.add(number, chosen[0][:shared], dict(zip(("chosen_ids", "rejected_ids"), answers, strict=True)))
    problems.check()
    notes = (f"{same:,} rows have equal answers, between which nothing can be learnt",) if same else ()
    return rows.tokenized(notes)


def tokenize_judgments(examples: Iterable[Judgment], renderer: Renderer, *, max_length: int) -> Tokenized:
    """Turn judged answers into rows of `prompt_ids`, `completion_ids` and `label`; see `tokenize_preferences`."""
    rows = _Rows(max_length)
    problems = Problems()
    for number, example in enumerate(examples):
        with problems.collect():
            prompt, answer = _halves(example, example.completion, renderer)
            rows.add(number, prompt, {"completion_ids": answer}, label=example.label)
    problems.check()
    return rows.tokenized(())


def _halves(example: Preference | Judgment, answer: Sequence[Message], renderer: Renderer) -> Halves:
    if len(answer) > 1:
        raise DataError(f"{example.where}: an answer must be a single turn, this one has {len(answer)}.")
    messages = (*example.prompt, *answer)
    (row,) = renderer.training_rows(Example(example.where, messages, tools=example.tools), "last_turn")
    first, last = np.flatnonzero(row.trained)[[0, -1]]
    return row.ids[:first], row.ids[first : last + 1]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two prompts have in common: all of them, unless a token joins the prompt's end to an answer."""
    width = min(len(one), len(other))
    different = np.flatnonzero(one[:width] != other[:width])
    return int(different[0]) if len(different) else width


class _Rows:
    """Collects rows within `max_length`, and what it took."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._columns: dict[str, list[Any]] = {}
        self._lengths: list[int] = []
        self._dropped: list[int] = []
        self._origin: list[int] = []
        self._trained: list[int] = []
        self._fingerprints: list[int] = []

    def add(self, origin: int, prompt: np.ndarray, answers: dict[str, np.ndarray], **others: Any) -> None:
        length, room = len(prompt) + max(map(len, answers.values())), self._max_length - len(prompt)
        if room < 1:
            self._dropped.append(length)
            return
        self._lengths.append(length)
        self._origin.append(origin)
        self._trained.append(min(len(ids[:room]) for ids in answers.values()))
        ends = [np.array([len(ids)], dtype=np.int32) for ids in answers.values()]  # equal tokens, divided otherwise
        self._fingerprints.append(fingerprint(np.concatenate([prompt, *answers.values(), *ends])))
        row = {"prompt_ids": prompt, **{name: ids[:room] for name, ids in answers.items()}, **others}
        for name, value in row.items():
            self._columns.setdefault(name, []).append(value)

    def tokenized(self, notes: tuple[str, ...]) -> Tokenized:
        from datasets import Dataset

        if not self._lengths:
            raise DataError(
                f"no row is left to train on: all {len(self._dropped)} have a prompt that fills max_length "
                f"{self._max_length}; the longest has {max(self._dropped, default=0)} tokens with its answer."
            )
        lengths = np.array(self._lengths)
        report = length_report(
            lengths, np.minimum(lengths, self._max_length), dropped=np.array(self._dropped, dtype=np.int64), notes=notes
        )
        facts = RowFacts(
            origin=np.array(self._origin, dtype=np.int64),
            length=lengths.astype(np.int32),
            trained=np.array(self._trained, dtype=np.int32),
            fingerprint=np.array(self._fingerprints, dtype=np.uint64),
        )
        return Tokenized(Dataset.from_dict(self._columns), report, facts)
