"""Several rows in one, each of which sees only itself.

Padding is computed for nothing; packing puts short rows behind each other into one of `max_length` instead. Two things
must not happen then, and both would look like a healthy run:

* **A row must not attend to its neighbour.** Positions start at 0 again with every row, and the batch has no
  `attention_mask`: from such positions transformers builds a block-diagonal causal mask (`find_packed_sequence_indices`
  in its masking_utils.py), where it is given no mask and no cache. Whether a model does is measured before training, by
  `check_isolation`, since a model with a mask of its own, or an attention kernel that looks at the first row of a batch
  only, would not.
* **A label must not move to its neighbour.** The loss compares each token's output with the next label, so the first
  label of a row would be asked of the last token of the row before. It is IGNORE in every row (see `tokens.py`).

So the loss and the gradients are those of the same rows unpacked, but for the order of sums.

Rows are placed by best fit decreasing: the longest first, each into the pack that it fills best. That is at most 11/9
of the least number of packs, plus 6/9 (Dósa 2007), and it does not depend on a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.lengths import RowFacts, Tokenized
from halfbyte.data.store import RowReader, RowWriter, key_of, stored, write_facts
from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ("input_ids", "labels", "position_ids")
_AT_ONCE = 512  # packs that are put together in one go
_LEAK = 0.01  # of the effect that an unpacked neighbour has


def pack(tokenized: Tokenized, max_length: int, *, cache: Path | None = None) -> Tokenized:
    """Put rows behind each other into rows of up to `max_length`.

    Args:
        tokenized: rows with a label for each token, none longer than `max_length`.
        max_length: tokens of the longest pack.
        cache: see `tokenize`.

    Returns:
        Rows of `input_ids`, `labels` and `position_ids`; the report is that of the rows that were packed, with a note.
    """
    build = partial(_build, tokenized=tokenized, max_length=max_length)
    if not tokenized.key:
        return stored(None, "", build)
    return stored(cache, key_of(packed=tokenized.key, max_length=max_length), build)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing.

    Args:
        lengths: of the rows, each from 1 to `capacity`.
        capacity: of a pack.

    Returns:
        Row numbers, pack after pack, and how many of them are in each pack; both int64.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs, by the room that is left in them
    rooms = 0  # bit r: there is a pack with room r
    packs = 0
    for row, length in _pairs(order, lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least that is enough
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, packs
            packs += 1
        pack_of[row] = chosen
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return np.argsort(pack_of, kind="stable"), np.bincount(pack_of, minlength=packs)


def _pairs(order: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Row and length as Python's numbers, which are quicker one by one; some at a time, since they are also larger."""
    for start in range(0, len(order), 1 << 14):
        rows = order[start : start + (1 << 14)]
        yield from zip(rows.tolist(), lengths[rows].tolist(), strict=True)


def _build(folder: Path, *, tokenized: Tokenized, max_length: int) -> None:
    assert tokenized.facts is not None
    lengths = np.minimum(tokenized.facts.length, max_length)
    rows, counts = best_fit(lengths, max_length)
    reader = RowReader(tokenized, COLUMNS[:2])
    with RowWriter(folder, COLUMNS) as writer:
        for members, sizes in _slices(rows, counts):
            widths = lengths[members].astype(np.int64)
            starts = np.cumsum(widths) - widths
            ids, labels = (np.concatenate(column) for column in zip(*map(reader.row, members.tolist()), strict=True))
            writer.write(
                np.add.reduceat(widths, np.cumsum(sizes) - sizes),
                input_ids=ids,
                labels=labels,
                position_ids=np.arange(len(ids)) - np.repeat(starts, widths),
            )
    firsts = np.cumsum(counts) - counts
    facts = RowFacts(
        origin=np.full(len(counts), -1, dtype=np.int64),
        length=np.add.reduceat(lengths[rows], firsts).astype(np.int32),
        trained=np.add.reduceat(tokenized.facts.trained[rows], firsts).astype(np.int32),
        fingerprint=np.zeros(len(counts), dtype=np.uint64),
    )
    share = lengths.sum(dtype=np.int64) / (len(counts) * max_length)
    note = f"{len(rows):,} rows are packed into {len(counts):,} of {max_length} tokens, which are {share:.1%} full"
    write_facts(folder, replace(tokenized.report, notes=(*tokenized.report.notes, note)), facts)


def _slices(rows: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some packs at a time: their rows, and how many are in each."""
    ends = np.cumsum(counts)
    for first in range(0, len(counts), _AT_ONCE):
        sizes = counts[first : first + _AT_ONCE]
        end = int(ends[first + len(sizes) - 1])
        yield rows[end - int(sizes.sum()) : end], sizes


def check_isolation(model: PreTrainedModel) -> None:
    """Measure that packed rows do not see each other: exchange the first row and look at what the second one says.

    Two packs of two rows of four tokens go through the model, twice.

    Raises:
        RequestError: they do; the model cannot be trained on packed rows.
    """
    import torch

    embeddings: Any = model.get_input_embeddings()
    words = min(8, embeddings.num_embeddings // 2)
    first, other, second = torch.arange(4) % words, torch.arange(4) % words + words, torch.arange(4).flip(0) % words
    apart = torch.cat([torch.arange(4), torch.arange(4)])

    def said(row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([row, second]).expand(2, -1).to(model.device)
        output = model(input_ids=ids, position_ids=positions.expand(2, -1).to(model.device), use_cache=False)
        return output.logits[:, 4:].float()

    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = (said(first, apart) - said(other, apart)).abs().max()
        joined = (said(first, torch.arange(8)) - said(other, torch.arange(8))).abs().max()
    model.train(was_training)
    if packed > _LEAK * joined:
        raise RequestError(
            f"packing is true, but with {type(model).__name__} and {model.config._attn_implementation} attention "
            "packed rows see each other; set packing: false, or another attn_implementation."
        )
