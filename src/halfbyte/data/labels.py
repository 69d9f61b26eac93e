"""Labelled text: rows for a classifier, and the names of its classes.

| layout | columns                                                       |
|---|---|
| a text | `text` or `sentence`, and `label`                             |
| a pair | `sentence1`, `sentence2` or `premise`, `hypothesis`, `label`  |

A label is text or an integer, and its name is how it is written: `positive`, `1`. Unless a recipe names them, the
classes are those of the training data, sorted, and nothing else: a label that turns up only in the evaluation data is
a mistake in one of the two files, since no training could ever have made the model say it. Where a recipe does name
them, an integer is a place among these names. They are kept in the model's config as `id2label`, so that an answer
comes back as a name and not as a number that somebody has to remember.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from halfbyte.data.examples import Examples, SourceLike, read_sources
from halfbyte.data.lengths import Tokenized, length_report
from halfbyte.data.problems import Problems
from halfbyte.data.read import Row
from halfbyte.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL = "label"
# The first whose columns are all there wins, pairs before single texts.
_LAYOUTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",))


@dataclass(frozen=True)
class LabelledText:
    """What one row teaches.

    Attributes:
        where: the file and line it came from, for messages.
        texts: one text, or a pair.
        label: the name of its class.
    """

    where: str
    texts: tuple[str, ...]
    label: str


def read_labelled(sources: Iterable[SourceLike] | SourceLike, *, seed: int = 0) -> Examples[LabelledText]:
    """Read and check labelled texts from files, folders and hub data sets; see `read_sources`.

    Raises:
        DataError: see `read_sources`; or a row lacks a text or its label, with file, line and what is missing.
    """
    return read_sources(sources, _parser, seed=seed)


def _parser(first: Row) -> Callable[[Row], LabelledText]:
    columns = _recognise(first)
    return lambda row: LabelledText(row.where, _texts(row, columns), _label(row))


class Labelled(Protocol):
    """A row with one label, or with one for each of its words."""

    @property
    def where(self) -> str:
        """The file and line it came from."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Its text, its pair of texts, or its words."""

    @property
    def label(self) -> str | tuple[str, ...]:
        """The name of its class, or of those of its words."""


def count_labels(examples: Iterable[Labelled]) -> Counter[str]:
    """How often each label occurs."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update([example.label] if isinstance(example.label, str) else example.label)
    return counts


def label_names(examples: Collection[Labelled]) -> tuple[str, ...]:
    """The classes of a training set, sorted: integers by value, otherwise by letter.

    Raises:
        DataError: there is only one, and nothing to tell apart.
    """
    names = count_labels(examples)
    if len(names) < 2:
        raise DataError(
            f"all {len(examples)} rows from {next(iter(examples)).where} on have the label {next(iter(names))!r}; "
            "a classifier needs at least two."
        )
    if all(_is_integer(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def tokenize_labelled(
    examples: Iterable[LabelledText], tokenizer: PreTrainedTokenizerBase, names: Sequence[str], *, max_length: int
) -> Tokenized:
    """Turn labelled texts into rows of token ids, each with the index of its class.

    The tokenizer puts its own special tokens around a text, as it did when the encoder was pretrained. A text that is
    too long loses its end (of a pair, the longer one does) and is counted in the report.

    Args:
        examples: the texts.
        tokenizer: the model's.
        names: the classes; a label's index is its place in here.
        max_length: tokens of the longest row.

    Raises:
        DataError: a label that is not among `names`.
    """
    from datasets import Dataset

    examples = list(examples)
    labels = []
    problems = Problems()
    for example in examples:
        if len(example.texts) != len(examples[0].texts):
            problems.add(f"{example.where}: there are {len(example.texts)} texts, and {len(examples[0].texts)} before.")
        with problems.collect():
            labels.append(label_index(example.label, names, f"{example.where}: the label"))
    problems.check()
    sides = list(zip(*(example.texts for example in examples), strict=True))
    whole = tokenizer(*map(list, sides), verbose=False)["input_ids"]
    encoded = tokenizer(*map(list, sides), truncation=True, max_length=max_length)
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    lengths = np.array([len(ids) for ids in whole])
    kept = np.array([len(ids) for ids in encoded["input_ids"]])
    report = length_report(lengths, kept)
    return Tokenized(Dataset.from_dict({**columns, "labels": labels}), report)


def label_index(name: str, names: Sequence[str], what: str) -> int:
    """The place of a label among the classes: that of its name, or the integer that it is.

    Args:
        name: the label, as `name_of_label` gives it.
        names: the classes.
        what: how a message about it begins.

    Raises:
        DataError: it is none of them.
    """
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names) and not any(_is_integer(one) for one in names):
        return int(name)
    raise DataError(f"{what} {name!r} is not among the classes; {nearest(name, names)}")


def name_of_label(value: Any, where: str, column: str) -> str:
    """What a label is called.

    Raises:
        DataError: it is neither text nor an integer.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: the column {column!r} must be text or an integer, it is a {type(value).__name__}.")
    return str(value).strip()


def _recognise(row: Row) -> tuple[str, ...]:
    """The text columns of a file, from its first row."""
    present = list(row.columns)
    for columns in _LAYOUTS:
        if all(column in present for column in columns):
            return columns
    for columns in _LAYOUTS:
        missing = [column for column in columns if column not in present]
        if len(missing) < len(columns):
            raise DataError(f"{row.where}: the column {missing[0]!r} is missing, the other half of {columns[0]!r}.")
    offered = " | ".join("+".join((*columns, LABEL)) for columns in _LAYOUTS)
    raise DataError(
        f"{row.where}: the columns {', '.join(present) or '(none)'} fit no layout of labelled text; give {offered}."
    )


def _texts(row: Row, columns: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for column in columns:
        value = row.columns.get(column)
        if not isinstance(value, str):
            what = "is missing" if value is None else f"must be text, it is a {type(value).__name__}"
            raise DataError(f"{row.where}: the column {column!r} {what}.")
        if not value.strip():
            raise DataError(f"{row.where}: the column {column!r} is empty.")
        found.append(value)
    return tuple(found)


def _label(row: Row) -> str:
    value = row.columns.get(LABEL)
    if value is None or value == "":
        raise DataError(f"{row.where}: the column {LABEL!r} is missing, which sequence-classification data needs.")
    return name_of_label(value, row.where, LABEL)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
