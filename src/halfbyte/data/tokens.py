"""Examples into token ids and labels, and rows into batches.

What a token counts for is decided here and stored as a label; nothing downstream looks at token ids again to guess it.
That is why padding goes by length: where pad and end-of-sequence are the same token (most Llama tokenizers), a mask by
id either drops the end token from the loss or trains the padding, and both look like a healthy run.

A conversation stays one row. Plain texts are joined, each followed by the end token, and cut into blocks of
`max_length`, so that no token is thrown away.

Examples are tokenized in chunks, by worker processes where there are many, and written in their order: the rows do not
depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte import env
from halfbyte.data.conversations import Example
from halfbyte.data.examples import Examples
from halfbyte.data.lengths import RowFacts, Tokenized, fingerprint, length_report
from halfbyte.data.problems import Problems
from halfbyte.data.render import IGNORE, Layout, Renderer
from halfbyte.data.store import RowWriter, key_of, stored, write_facts
from halfbyte.errors import DataError, WorkError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # examples that a worker takes at once
WORTH_WORKERS = 20_000  # examples; below, starting processes takes longer than the work
COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True)
class _Settings:
    """How examples are tokenized."""

    max_length: int
    train_on: str


@dataclass
class _Chunk:
    """What became of a chunk of examples: rows one after the other, and texts that are still to be joined."""

    ids: np.ndarray
    labels: np.ndarray
    kept: np.ndarray  # tokens of each row
    length: np.ndarray  # before it was cut
    trained: np.ndarray
    origin: np.ndarray
    fingerprint: np.ndarray
    dropped: np.ndarray  # tokens of each row that is not used
    texts: list[np.ndarray] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    split: int = 0  # conversations that became a row for each answer
    unseen_tools: int = 0  # conversations whose tools the template does not show


def tokenize(
    examples: Collection[Example],
    renderer: Renderer,
    *,
    max_length: int,
    train_on: str,
    cache: Path | None = None,
    workers: int | None = None,
) -> Tokenized:
    """Turn examples into rows of token ids and labels.

    Args:
        examples: conversations and plain texts.
        renderer: the renderer of the model's tokenizer.
        max_length: tokens of the longest row.
        train_on: see `Renderer.layouts`. Plain text is always trained whole.
        cache: a folder in which rows are kept and found again, for examples that know their digest; None keeps
            nothing, and holds the rows in memory.
        workers: processes; None: as many as cores, where there are many examples; 0: this one.

    Raises:
        DataError: the first bad rows and the number of the others; or no row is left.
        WorkError: the worker processes died.
    """
    if workers is None:
        workers = _cores() if len(examples) >= WORTH_WORKERS else 0
    settings = _Settings(max_length, train_on)
    build = partial(_build, examples=examples, renderer=renderer, settings=settings, workers=workers)
    if not isinstance(examples, Examples):
        return stored(None, "", build)
    key = key_of(
        examples=examples.digest,
        tokenizer=_digest(renderer.tokenizer),
        template=renderer.digest,
        versions=[version("halfbyte"), version("transformers")],
        max_length=max_length,
        train_on=train_on,
    )
    return stored(cache, key, build)


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    content = [tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items(), key=str)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(
    folder: Path, *, examples: Collection[Example], renderer: Renderer, settings: _Settings, workers: int
) -> None:
    """Write the data set; see `halfbyte.data.store`."""
    chunks: list[_Chunk] = []  # without their tokens
    blocks = _Blocks(settings.max_length)
    problems = Problems()
    with RowWriter(folder, COLUMNS) as writer:
        for chunk in _encoded(examples, renderer, settings, workers):
            problems.extend(chunk.problems.first, chunk.problems.count)
            if problems.count:
                continue
            if len(chunk.kept):
                writer.write(chunk.kept, input_ids=chunk.ids, labels=chunk.labels)
            full = blocks.add(chunk.texts)
            chunks += [_without_tokens(chunk), *_write_blocks(writer, full)]
        chunks += _write_blocks(writer, blocks.rest())
    problems.check()
    facts = RowFacts(
        **{name: np.concatenate([getattr(c, name) for c in chunks]) for name in RowFacts.__dataclass_fields__}
    )
    kept = np.concatenate([c.kept for c in chunks])
    dropped = np.concatenate([c.dropped for c in chunks])
    if not len(kept):
        raise DataError(
            f"no row is left to train on: all {len(dropped)} have their answer beyond max_length "
            f"{settings.max_length}; the longest has {dropped.max(initial=0)} tokens."
        )
    whole = renderer.prompt_is_whole or not (facts.origin >= 0).any()  # plain text has no prompts
    report = length_report(
        facts.length, kept, trained=int(facts.trained.sum(dtype=np.int64)), dropped=dropped, notes=_notes(chunks, whole)
    )
    write_facts(folder, report, facts)


def _notes(chunks: Sequence[_Chunk], whole: bool) -> tuple[str, ...]:
    split, unseen = sum(c.split for c in chunks), sum(c.unseen_tools for c in chunks)
    notes = []
    if split:
        notes.append(
            f"{split:,} conversations became one row for each answer, since the chat template rewrites earlier turns"
        )
    if unseen:
        notes.append(f"{unseen:,} rows have tools that the chat template does not show to the model")
    if not whole:
        notes.append(
            "the chat template's prompt ends within a token, so an answer's first word is not trained as it will be "
            "asked for; let the prompt end in a special token or a line break"
        )
    return tuple(notes)


def _encoded(examples: Iterable[Example], renderer: Renderer, settings: _Settings, workers: int) -> Iterator[_Chunk]:
    """Chunks in the order of the examples. Few are in flight at a time, so memory stays bounded."""
    encoder = _Encoder(renderer, settings)
    numbered = enumerate(examples)
    chunks = iter(lambda: list(islice(numbered, CHUNK)), [])
    if workers < 2:
        yield from map(encoder, chunks)
        return
    # spawn: a forked copy of a process with OpenMP's and tokenizers' threads may wait for one of them for ever
    state = (renderer.tokenizer, settings)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, state) as pool:
        waiting: deque[Future[_Chunk]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkError(
                "the processes that tokenize have died; a script that starts a run needs `if __name__ == '__main__':` "
                "around its start, and they need memory."
            ) from error


_ENCODER: _Encoder | None = None  # of a worker process


def _start_worker(tokenizer: PreTrainedTokenizerBase, settings: _Settings) -> None:
    global _ENCODER
    env.quiet_libraries()  # each worker with threads of its own would be too many
    _ENCODER = _Encoder(Renderer(tokenizer), settings)


def _work(chunk: list[tuple[int, Example]]) -> _Chunk:
    assert _ENCODER is not None
    return _ENCODER(chunk)


class _Encoder:
    """Tokenizes a chunk of numbered examples."""

    def __init__(self, renderer: Renderer, settings: _Settings) -> None:
        self._renderer, self._settings = renderer, settings

    def __call__(self, chunk: list[tuple[int, Example]]) -> _Chunk:
        problems = Problems()
        layouts: list[Layout] = []
        origin: list[int] = []
        texts: list[str] = []
        split = unseen = 0
        for number, example in chunk:
            if not example.messages:
                texts.append(example.text)
                continue
            with problems.collect():
                found = self._renderer.layouts(example, self._settings.train_on)
                layouts += found
                origin += [number] * len(found)
                split += len(found) > 1
                unseen += bool(example.tools) and not self._renderer.shows_tools
        encoded = self._renderer.encode(layouts, problems)
        if problems.count:
            encoded, origin, texts = [], [], []
        rows = _cut(
            [row.ids for row in encoded],
            [row.trained for row in encoded],
            np.array(origin, dtype=np.int64),
            self._settings.max_length,
        )
        rows.texts = encode_texts(texts, self._renderer.tokenizer)
        rows.problems, rows.split, rows.unseen_tools = problems, split, unseen
        return rows


def _cut(ids: list[np.ndarray], trained: list[np.ndarray], origin: np.ndarray, max_length: int) -> _Chunk:
    """Rows within `max_length`; those without a trained token in it are dropped.

    The first token of a row is never predicted, so it has no label: behind padding on the left or behind another row it
    would be asked of a token that knows nothing of it, and it would count in what the loss is divided by.
    """
    for mask in trained:
        mask[:1] = False
    counts = [int(mask[:max_length].sum()) for mask in trained]
    used = [index for index, count in enumerate(counts) if count]
    kept_ids = [ids[index][:max_length] for index in used]
    labels = [np.where(trained[index][:max_length], ids[index][:max_length], IGNORE) for index in used]
    empty = [np.zeros(0, dtype=np.int32)]
    return _Chunk(
        ids=np.concatenate(kept_ids or empty),
        labels=np.concatenate(labels or empty).astype(np.int32, copy=False),
        kept=np.array([len(row) for row in kept_ids], dtype=np.int32),
        length=np.array([len(ids[index]) for index in used], dtype=np.int32),
        trained=np.array([counts[index] for index in used], dtype=np.int32),
        origin=origin[used] if used else np.zeros(0, dtype=np.int64),
        fingerprint=np.array([fingerprint(ids[index]) for index in used], dtype=np.uint64),
        dropped=np.array([len(row) for row, count in zip(ids, counts, strict=True) if not count], dtype=np.int32),
    )


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of plain texts, int32, each with one BOS where the tokenizer puts one, and one end token."""
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = []
    for ids in tokenizer(list(texts), return_attention_mask=False)["input_ids"]:
        if bos is not None and ids[:2] == [bos, bos]:  # the text itself begins with one
            ids = ids[1:]
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        found.append(np.array(ids, dtype=np.int32))
    return found


class _Blocks:
    """Joins texts into one stream and cuts it into blocks."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._rest = np.zeros(0, dtype=np.int32)

    def add(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The blocks that are full now."""
        stream = np.concatenate([self._rest, *texts])
        full = len(stream) // self._max_length * self._max_length
        self._rest = stream[full:]
        return [stream[start : start + self._max_length] for start in range(0, full, self._max_length)]

    def rest(self) -> list[np.ndarray]:
        """The last block, which may be short. A single token has nothing to predict."""
        return [self._rest] if len(self._rest) > 1 else []


def _write_blocks(writer: RowWriter, blocks: Sequence[np.ndarray]) -> list[_Chunk]:
    if not blocks:
        return []
    trained = [np.ones(len(block), dtype=bool) for block in blocks]
    rows = _cut(list(blocks), trained, np.full(len(blocks), -1, dtype=np.int64), len(blocks[0]))
    writer.write(rows.kept, input_ids=rows.ids, labels=rows.labels)
    return [_without_tokens(rows)]


def _without_tokens(chunk: _Chunk) -> _Chunk:
    chunk.ids = chunk.labels = np.zeros(0, dtype=np.int32)
    chunk.texts = []
    return chunk


def pad_rows(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Collate rows into a batch, padded on the right by length.

    Args:
        rows: each with `input_ids`, `labels` (one for each token, or one for the row) and perhaps `token_type_ids`, or
            the `position_ids` of a packed row.
        pad_id: any token id; it is masked and carries no label, so it may be the end token.

    Returns:
        `input_ids`, `attention_mask` and the other columns, int64 [rows, longest]; labels of rows are int64 [rows].
        Packed rows have no `attention_mask`: transformers then derives one from their positions (see `packing.py`).
    """
    import torch

    fillers = {"input_ids": pad_id, "token_type_ids": 0, "position_ids": 0, "labels": IGNORE}
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    if "position_ids" not in rows[0]:
        batch["attention_mask"] = torch.zeros((len(rows), width), dtype=torch.int64)
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
