"""The reference of preference optimization: the log-probabilities that answers had before the first step.

**It is measured once, before the first step**, by the very model that is then trained, and kept: one model is in
memory, and one forward pass a step is saved. It is measured with the adapter *on*. The usual way, to switch the adapter
off at each step, is the reference only if the adapter starts at zero (trl#4723): with PiSSA or OLoRA, which take the
adapter out of the base, what is left without it is no model at all. And trl's own way for an adapter that is there
already, a second one that starts as its copy, would take its start out of the base *again*, with these two: the adapter
that is trained then fits a base that nobody can load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from halfbyte.data import IGNORE, pad_rows
from halfbyte.train import ranks

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE = "reference.safetensors"


def pad_answers(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Prompts with their answers behind them, in the layout of trl's preference trainers.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (1 where a token is trained), int64 [pairs, longest].
    """
    rows = [{"input_ids": [*given, *said], "labels": [IGNORE] * len(given) + list(said)} for given, said in pairs]
    batch = pad_rows(rows, pad_id)
    batch["completion_mask"] = (batch.pop("labels") != IGNORE).long()
    return batch


@contextmanager
def no_second_adapter(model: Any) -> Iterator[None]:
    """Keep trl's trainers from adding an adapter `ref` while they are made: its parameters are found in `default`."""
    if not hasattr(model, "peft_config"):
        yield
        return
    find = model.get_parameter
    model.add_adapter = lambda *_: None
    model.get_parameter = lambda name: find(name.replace(".ref.", ".default."))  # which trl copies onto themselves
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


def with_reference(
    trainer: Any, rows: Dataset, path: Path, names: Sequence[str], measure: Callable[..., torch.Tensor]
) -> Dataset:
    """The rows with the columns `names`, from `path` if it was written for the same rows, or from the model as it is.

    Args:
        trainer: whose model, batches and precision are used.
        rows: tokens, in columns that end in `_ids`.
        path: where they are kept for a run that is gone on with.
        names: the columns to add.
        measure: (model, batch) -> [names, rows].
    """
    from datasets import Dataset, concatenate_datasets

    parts = sorted(name for name in rows.column_names if name.endswith("_ids"))
    digest = hashlib.sha256(repr([rows[part][:] for part in parts]).encode()).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata().get("rows") == digest:
                kept = {name: file.get_tensor(name).tolist() for name in names}
                return concatenate_datasets([rows, Dataset.from_dict(kept)], axis=1)
    model, share = trainer.model, rows.shard(ranks.count(), ranks.index(), contiguous=True)
    was_training = model.training
    model.eval()
    found = [torch.empty(len(names), 0)]  # a process may have no share
    batches = DataLoader(share, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    with torch.no_grad(), trainer.accelerator.autocast():
        for batch in batches:
            found.append(measure(model, trainer._prepare_inputs(batch)).float().cpu())
    model.train(was_training)
    columns = torch.cat(ranks.gathered(torch.cat(found, dim=1)), dim=1)
    tensors = {name: values.contiguous() for name, values in zip(names, columns, strict=True)}
    ranks.from_first(lambda: save_file(tensors, path, metadata={"rows": digest}))
    return concatenate_datasets([rows, Dataset.from_dict({n: t.tolist() for n, t in tensors.items()})], axis=1)


def answer_outputs(model: torch.nn.Module, batch: dict[str, Any], prefix: str = "") -> Any:
    """The model on the rows `input_ids` of a batch, with trl's fused head on the answers, as in training."""
    labels = batch[f"{prefix}input_ids"].masked_fill(batch[f"{prefix}completion_mask"] == 0, IGNORE)
    given = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    return model(**given, labels=labels, use_cache=False, fused_lm_head=True)
