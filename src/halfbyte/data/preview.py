"""Rows as the model sees them, and the odd ones: what a person should look at before a run and not after it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.conversations import Example
from halfbyte.data.examples import Examples
from halfbyte.data.labels import Labelled
from halfbyte.data.lengths import Tokenized
from halfbyte.data.render import IGNORE

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

NEAR = 0.95  # of max_length: a little more, and the end of such a row is cut off
SHORT = 2  # trained tokens, the end token among them
TRAINED_STYLE, REJECTED_STYLE, GIVEN_STYLE = "bold green", "bold red", "dim"
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours


@dataclass(frozen=True)
class Oddity:
    """Rows that may be a mistake.

    Attributes:
        what: what is odd about them.
        count: how many there are.
        where: file and line of the first few.
    """

    what: str
    count: int
    where: tuple[str, ...]


def shown_row(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, colour: bool = True
) -> Text:
    """A row as text, special tokens included, with the trained tokens in colour, or in brackets where there is none."""
    from rich.text import Text

    text = Text()
    trained = np.array(labels) != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    before = ""
    for start, end in pairwise(edges):
        # Decoded by itself, a piece would lose the space in front of its first word.
        whole = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False))
        piece = whole.removeprefix(before)
        before = whole
        if trained[start]:
            text.append(piece if colour else f"{OPEN}{piece}{CLOSE}", TRAINED_STYLE)
        else:
            text.append(piece, GIVEN_STYLE)
    return text


def shown_answers(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, colour: bool = True) -> Text:
    """A row of `tokenize_preferences` or `tokenize_judgments`: the prompt, and each answer under its name.

    An answer is shown as the model sees it behind the prompt; a good one green and a bad one red, or in brackets.
    """
    from rich.text import Text

    prompt = list(row["prompt_ids"])
    given = str(tokenizer.decode(prompt, skip_special_tokens=False))
    text = Text(given, GIVEN_STYLE)
    if "chosen_ids" in row:
        answers = [("chosen", row["chosen_ids"], True), ("rejected", row["rejected_ids"], False)]
    else:
        good = bool(row["label"])
        answers = [("good" if good else "bad", row["completion_ids"], good)]
    for name, ids, good in answers:
        answer = str(tokenizer.decode([*prompt, *ids], skip_special_tokens=False)).removeprefix(given)
        text.append(f"\n{name}: ", "italic")
        text.append(answer if colour else f"{OPEN}{answer}{CLOSE}", TRAINED_STYLE if good else REJECTED_STYLE)
    return text


def odd_rows(
    tokenized: Tokenized,
    examples: Examples[Any],
    max_length: int,
    *,
    held_out: Tokenized | None = None,
    first: int = 3,
) -> list[Oddity]:
    """What is odd about conversations, pairs of answers or judged answers.

    Args:
        tokenized: their rows, not packed.
        examples: what they were made of.
        max_length: where rows are cut.
        held_out: rows that are measured on; those that are trained on as well measure memory.
        first: how many of each are named.

    Returns:
        Those kinds of oddity that occur.
    """
    assert tokenized.facts is not None
    facts = tokenized.facts
    _, at, counts = np.unique(facts.fingerprint, return_index=True, return_counts=True)
    repeated = np.ones(len(facts.fingerprint), dtype=bool)
    repeated[at] = False  # but the first of each
    near = (facts.length > NEAR * max_length) & (facts.length <= max_length)
    kinds = [
        (f"repeat an earlier row ({int(counts.max(initial=0))} times the same at most)", repeated),
        (f"have {SHORT} trained tokens or less", facts.trained <= SHORT),
        ("are nearly as long as max_length", near),
        ("are cut at max_length", facts.length > max_length),
    ]
    if held_out is not None and held_out.facts is not None:
        kinds.append(("are measured on as well", np.isin(facts.fingerprint, held_out.facts.fingerprint)))
    found = [
        Oddity(what, int(chosen.sum()), _where(examples, facts.origin[chosen], first))
        for what, chosen in kinds
        if chosen.any()
    ]
    silent = [example.where for example in examples if isinstance(example, Example) and _has_empty_answer(example)]
    if silent:
        found.append(Oddity("have an empty answer among others", len(silent), tuple(silent[:first])))
    return found


def _where(examples: Examples[Any], origin: np.ndarray, first: int) -> tuple[str, ...]:
    positions = np.unique(origin[origin >= 0])[:first]
    return tuple(example.where for example in examples.take(positions))


def _has_empty_answer(example: Example) -> bool:
    return any(
        message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
        for message in example.messages
    )


def odd_labels(examples: Iterable[Labelled], *, first: int = 3) -> list[Oddity]:
    """What is odd about labelled texts and tagged words: repeated ones, and those that have two labels."""
    labels: defaultdict[tuple[str, ...], Counter[str | tuple[str, ...]]] = defaultdict(Counter)
    repeated: list[str] = []
    contradicted: list[str] = []
    for example in examples:
        seen = labels[example.texts]
        if seen:
            (repeated if example.label in seen else contradicted).append(example.where)
        seen[example.label] += 1
    kinds = (("repeat an earlier row", repeated), ("repeat an earlier text with another label", contradicted))
    return [Oddity(what, len(where), tuple(where[:first])) for what, where in kinds if where]
