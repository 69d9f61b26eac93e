"""How long rows are, what of them is cut or dropped, and how much is trained: told before training, not found after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class LengthReport:
    """What became of the examples.

    Attributes:
        rows: rows (conversations, blocks of text, labelled texts) that are trained on.
        cut: rows that lost their end because they are longer than `max_length`.
        dropped: rows that are not used, because nothing to learn lies within `max_length`.
        tokens: all tokens of the rows.
        trained: tokens that the loss is computed on; None where the loss is on a row's class.
        longest: tokens of the longest row before it was cut.
        percentiles: tokens of a row before it was cut: half of the rows have up to `percentiles["50"]`.
        lost: tokens that were cut off, those of dropped rows included.
        notes: what else a person should know, a sentence each.
    """

    rows: int
    cut: int
    dropped: int
    tokens: int
    trained: int | None
    longest: int
    percentiles: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cut = f", {self.cut:,} cut" if self.cut else ""
        dropped = f", {self.dropped:,} dropped (no answer within max_length)" if self.dropped else ""
        trained = "" if self.trained is None else f", {self.trained / self.tokens:.1%} trained"
        notes = "".join(f"\n  {note}" for note in self.notes)
        return f"{self.rows:,} rows, {self.tokens:,} tokens{trained}{cut}{dropped}{notes}"

    def as_dict(self) -> dict[str, Any]:
        """The counts, for a summary."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class RowFacts:
    """What is known of each row of a token data set, by its place in it.

    Attributes:
        origin: place of the row's example among the examples, int64; -1 for a block of text or a pack, which may hold
            several.
        length: tokens before the row was cut, int32.
        trained: tokens that the loss is computed on, int32; of a pair of answers, those of the shorter one.
        fingerprint: equal for equal tokens, uint64.
    """

    origin: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    fingerprint: np.ndarray


@dataclass(frozen=True)
class Tokenized:
    """A data set ready for training, and its report.

    Its columns are `input_ids` and `labels`: one for each token, IGNORE where it is not trained, or one for the row,
    the index of its class. A tokenizer of pairs adds `token_type_ids`; packed rows add `position_ids`. Those of pairs
    and of judged answers are in `halfbyte.data.pairs`.

    Attributes:
        dataset: the rows.
        report: what became of the examples.
        facts: what is known of each row; None for labelled texts.
        key: names what the rows were made from (see `halfbyte.data.store`); empty where they are not kept.
    """

    dataset: Dataset
    report: LengthReport
    facts: RowFacts | None = None
    key: str = ""


def fingerprint(ids: np.ndarray) -> int:
    """A number below 2^64 that is equal for equal tokens."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def length_report(
    lengths: np.ndarray,
    kept: np.ndarray,
    *,
    trained: int | None = None,
    dropped: np.ndarray | None = None,
    notes: tuple[str, ...] = (),
) -> LengthReport:
    """Count.

    Args:
        lengths: tokens of each used row before it was cut.
        kept: tokens of each used row after it.
        trained: tokens that the loss is computed on.
        dropped: tokens of each row that is not used.
        notes: see `LengthReport`.
    """
    dropped = np.zeros(0, dtype=np.int64) if dropped is None else dropped
    everything = np.concatenate([lengths, dropped])
    # "lower": a length that some row has, and not a mean of two
    percentiles = np.percentile(everything, PERCENTILES, method="lower") if len(everything) else ()
    return LengthReport(
        rows=len(kept),
        cut=int((kept < lengths).sum()),
        dropped=len(dropped),
        tokens=int(kept.sum(dtype=np.int64)),
        trained=trained,
        longest=int(everything.max(initial=0)),
        percentiles={str(p): int(value) for p, value in zip(PERCENTILES, percentiles, strict=False)},
        lost=int(everything.sum(dtype=np.int64) - kept.sum(dtype=np.int64)),
        notes=notes,
    )
