"""Examples into token ids and labels, and rows into batches.

What a token counts for is decided here and stored as a label; nothing downstream looks at token ids again to guess it.
That is why padding goes by length: where pad and end-of-sequence are the same token (most Llama tokenizers), a mask by
id either drops the end token from the loss or trains the padding, and both look like a healthy run.

A conversation stays one row. Plain texts are joined, each followed by the end token, and cut into blocks of
`max_length`, so that no token is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.data.conversations import Example
from halfbyte.data.render import IGNORE, Renderer
from halfbyte.errors import DataError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Labelled = tuple[list[int], list[int]]  # input ids and labels, equally long


@dataclass(frozen=True)
class LengthReport:
    """What became of the examples.

    Attributes:
        rows: rows (conversations, blocks of text, labelled texts) that are trained on.
        cut: rows that lost their end because they are longer than `max_length`.
        dropped: conversations that are not used, because nothing of an answer lies within `max_length`.
        tokens: all tokens of the rows.
        trained: tokens that the loss is computed on; None where the loss is on a row's class.
        longest: tokens of the longest conversation or labelled text before it was cut.
    """

    rows: int
    cut: int
    dropped: int
    tokens: int
    trained: int | None
    longest: int

    def __str__(self) -> str:
        cut = f", {self.cut:,} cut" if self.cut else ""
        dropped = f", {self.dropped:,} dropped (no answer within max_length)" if self.dropped else ""
        trained = "" if self.trained is None else f", {self.trained / self.tokens:.1%} trained"
        return f"{self.rows:,} rows, {self.tokens:,} tokens{trained}{cut}{dropped}"

    def as_dict(self) -> dict[str, int | None]:
        """The counts, for a summary."""
        return asdict(self)


@dataclass(frozen=True)
class Tokenized:
    """A data set ready for training, and its report.

    Its columns are `input_ids` and `labels`: one for each token, IGNORE where it is not trained, or one for the row,
    the index of its class. A tokenizer of pairs adds `token_type_ids`.
    """

    dataset: Dataset
    report: LengthReport


def tokenize(examples: Sequence[Example], renderer: Renderer, *, max_length: int, train_on: str) -> Tokenized:
    """Turn examples into rows of token ids and labels.

    Args:
        examples: conversations and plain texts.
        renderer: the renderer of the model's tokenizer.
        max_length: tokens of the longest row.
        train_on: "completion" puts the loss on the assistant's tokens, "all" on every token. Plain text is always
            trained whole.

    Raises:
        DataError: a row has no token to train on, or no row is left.
    """
    from datasets import Dataset

    rows: list[Labelled] = []
    cut = dropped = longest = 0
    for example in examples:
        if not example.messages:
            continue
        ids, labels = _conversation(example, renderer, train_on)
        longest = max(longest, len(ids))
        if len(ids) > max_length:
            ids, labels = ids[:max_length], labels[:max_length]
            if not _trained(labels):
                dropped += 1
                continue
            cut += 1
        rows.append((ids, labels))
    rows += _blocks([example.text for example in examples if not example.messages], renderer.tokenizer, max_length)
    if not rows:
        raise DataError(
            f"no row is left to train on: all {dropped} have their answer beyond max_length {max_length}; "
            f"the longest has {longest} tokens."
        )
    report = LengthReport(
        rows=len(rows),
        cut=cut,
        dropped=dropped,
        tokens=sum(len(ids) for ids, _ in rows),
        trained=sum(_trained(labels) for _, labels in rows),
        longest=longest,
    )
    return Tokenized(Dataset.from_dict({"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]}), report)


def _conversation(example: Example, renderer: Renderer, train_on: str) -> Labelled:
    if train_on == "all":
        ids = renderer.ids(example.messages, prompt=False)
        labels = list(ids)
    else:
        ids, answers = renderer.training_ids(example.messages, example.where)
        labels = [token if answer else IGNORE for token, answer in zip(ids, answers, strict=True)]
    if not _trained(labels):
        raise DataError(f"{example.where}: no token of this row would be trained on; its answer renders to nothing.")
    return ids, labels


def _trained(labels: Sequence[int]) -> int:
    """How many tokens are predicted and count: the first of a row is never predicted."""
    return sum(label != IGNORE for label in labels[1:])


def _blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Labelled]:
    """Join texts into one stream, an end token after each, and cut it; the last block may be short."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None and stream[-1] != tokenizer.eos_token_id:
            stream.append(tokenizer.eos_token_id)
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [(block, block) for block in blocks if len(block) > 1]  # a single token has nothing to predict


def pad_rows(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Collate rows into a batch, padded on the right by length.

    Args:
        rows: each with `input_ids`, `labels` (one for each token, or one for the row) and perhaps `token_type_ids`.
        pad_id: any token id; it is masked and carries no label, so it may be the end token.

    Returns:
        `input_ids`, `attention_mask` and the other columns, int64 [rows, longest]; labels of rows are int64 [rows].
    """
    import torch

    fillers = {"input_ids": pad_id, "token_type_ids": 0, "labels": IGNORE}
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"attention_mask": torch.zeros((len(rows), width), dtype=torch.int64)}
    for index, row in enumerate(rows):
        batch["attention_mask"][index, : len(row["input_ids"])] = 1
    for name in fillers.keys() & rows[0].keys():
        if isinstance(rows[0][name], int):
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.int64)
            continue
        batch[name] = torch.full((len(rows), width), fillers[name], dtype=torch.int64)
        for index, row in enumerate(rows):
            batch[name][index, : len(row[name])] = torch.as_tensor(row[name])
    return batch
