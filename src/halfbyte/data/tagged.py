"""Tagged words: rows for a token classifier, such as named entities, and where in the tokens the tags stand.

| layout          | columns                                                              |
|---|---|
| JSON, Parquet   | `tokens` or `words`, and `tags`, `ner_tags` or `labels`: two lists   |
| CoNLL           | a line for each word, its tag last; an empty line between sentences  |

A tag is text or an integer, named as a label is (see `labels.py`).

**A word's tag is learnt at its first token** (the usual way since BERT: Devlin et al. 2019, section 5.3); its other
tokens carry no label. So each word counts once in loss and metrics, however many pieces the tokenizer makes of it.
The words are joined by spaces, as running text has them, and tokens are matched to words by their place in that text:
what a tokenizer does at a word's start is the same in training and when a sentence is asked about later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.examples import Examples, SourceLike, read_sources
from halfbyte.data.labels import label_index, name_of_label
from halfbyte.data.lengths import Tokenized, length_report
from halfbyte.data.problems import Problems
from halfbyte.data.read import Row
from halfbyte.data.render import IGNORE
from halfbyte.errors import DataError, RequestError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")


@dataclass(frozen=True)
class TaggedText:
    """What one row teaches.

    Attributes:
        where: the file and line it came from, for messages.
        texts: the words.
        label: the name of each word's tag.
    """

    where: str
    texts: tuple[str, ...]
    label: tuple[str, ...]


def read_tagged(sources: Iterable[SourceLike] | SourceLike, *, seed: int = 0) -> Examples[TaggedText]:
    """Read and check tagged words from files, folders and hub data sets; see `read_sources`.

    Raises:
        DataError: see `read_sources`; or a row lacks a word or a tag, with file, line and what is missing.
    """
    return read_sources(sources, _parser, seed=seed)


def tokenize_tagged(
    examples: Iterable[TaggedText], tokenizer: PreTrainedTokenizerBase, names: Sequence[str], *, max_length: int
) -> Tokenized:
    """Turn tagged words into rows of `input_ids` and `labels`, a tag's index at the first token of each word.

    A sentence that is too long loses its end, and the words there are not learnt and not measured; a word of which a
    tokenizer makes nothing (a soft hyphen) cannot be either. Both are in the report.

    Args:
        examples: the words.
        tokenizer: the model's.
        names: the tags; a tag's index is its place in here.
        max_length: tokens of the longest row.

    Raises:
        DataError: a tag that is not among `names`.
        RequestError: the tokenizer cannot say where in a text its tokens stand.
    """
    from datasets import Dataset

    if not tokenizer.is_fast:
        raise RequestError(
            f"the tokenizer of {tokenizer.name_or_path} cannot say which word a token belongs to; "
            "token-classification needs one with a tokenizer.json."
        )
    examples = list(examples)
    texts = [" ".join(example.texts) for example in examples]
    whole = np.array([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    kept = np.array([len(ids) for ids in encoded["input_ids"]])
    problems = Problems()
    rows, cut, silent = [], 0, 0
    for example, offsets, is_cut in zip(examples, encoded["offset_mapping"], (kept < whole).tolist(), strict=True):
        with problems.collect():
            tags = [label_index(tag, names, f"{example.where}: the tag") for tag in example.label]
            first = first_tokens(example.texts, offsets)
            rows.append(_labels(tags, first, len(offsets), example.where))
            cut, silent = cut + is_cut * first.count(None), silent + (not is_cut) * first.count(None)
    problems.check()
    words = sum(len(example.texts) for example in examples)
    notes = []
    if cut:
        notes.append(f"{cut:,} of {words:,} words are cut off, and neither learnt nor measured")
    if silent:
        notes.append(f"{silent:,} of {words:,} words have no token of their own, and are neither learnt nor measured")
    report = length_report(whole, kept, trained=words - cut - silent, notes=tuple(notes))
    return Tokenized(Dataset.from_dict({"input_ids": encoded["input_ids"], "labels": rows}), report)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The first token of each word.

    Args:
        words: at least one.
        offsets: start and end of each token in the words joined by spaces; equal for a token that stands for no text.

    Returns:
        Places among the tokens; None for a word in which no token begins.
    """
    text = " ".join(words)
    starts = np.cumsum([0] + [len(word) + 1 for word in words[:-1]])
    found: list[int | None] = [None] * len(words)
    for at, (start, end) in enumerate(offsets):
        begin = start + len(text[start:end]) - len(text[start:end].lstrip())  # the space before a word may be in it
        if begin >= end:
            continue
        word = int(np.searchsorted(starts, begin, side="right")) - 1
        if found[word] is None:
            found[word] = at
    return found


def shown_tags(ids: Sequence[int], labels: Sequence[int], names: Sequence[str], tokenizer: Any) -> Text:
    """A row as text, with the tag behind the first token of each word."""
    from rich.text import Text

    text, before = Text(), ""
    for at, label in enumerate(labels):
        whole = str(tokenizer.decode(list(ids[: at + 1]), skip_special_tokens=False))
        text.append(whole.removeprefix(before))
        before = whole
        if label != IGNORE:
            text.append(f"/{names[label]}", "bold green")
    return text


def _labels(tags: Sequence[int], first: Sequence[int | None], count: int, where: str) -> list[int]:
    labels = [IGNORE] * count
    for tag, at in zip(tags, first, strict=True):
        if at is not None:
            labels[at] = tag
    if not any(label != IGNORE for label in labels):
        raise DataError(f"{where}: there is no word to learn a tag for.")
    return labels


def _parser(first: Row) -> Callable[[Row], TaggedText]:
    words, tags = (_column(first, names) for names in (WORDS, TAGS))
    return lambda row: _parse(row, words, tags)


def _column(row: Row, names: tuple[str, ...]) -> str:
    for name in names:
        if name in row.columns:
            return name
    present = ", ".join(row.columns) or "(none)"
    hint = " (a text file in CoNLL's layout must end in .conll)" if present == "text" else ""
    raise DataError(
        f"{row.where}: the columns {present} fit no layout of tagged words; "
        f"give {' or '.join(WORDS)}, and {' or '.join(TAGS)}{hint}."
    )


def _parse(row: Row, words: str, tags: str) -> TaggedText:
    for column in (words, tags):
        value = row.columns.get(column)
        if value is None:
            raise DataError(f"{row.where}: the column {column!r} is missing.")
        if not isinstance(value, list):
            raise DataError(f"{row.where}: the column {column!r} must be a list, it is a {type(value).__name__}.")
    texts, labels = row.columns[words], row.columns[tags]
    if len(texts) != len(labels):
        raise DataError(f"{row.where}: there are {len(texts)} {words} and {len(labels)} {tags}; each word needs a tag.")
    if not texts:
        raise DataError(f"{row.where}: the column {words!r} is empty.")
    for at, word in enumerate(texts):
        if not isinstance(word, str):
            raise DataError(f"{row.where}: {words}[{at}] must be text, it is a {type(word).__name__}.")
    return TaggedText(
        row.where, tuple(texts), tuple(name_of_label(tag, row.where, f"{tags}[{at}]") for at, tag in enumerate(labels))
    )
