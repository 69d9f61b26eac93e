"""trl's SFTTrainer with the guards of `halfbyte.train.guards`: a model learns to write.

The chunked cross-entropy is trl's. Rows arrive with labels; trl then sums the loss over labels and divides it once, by
the number of trained tokens of *all* micro-batches of a step; the tests hold it to that.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig, SFTTrainer

from halfbyte.data import IGNORE, pad_rows
from halfbyte.train.guards import Guards, float32_masters, options

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe


class Trainer(Guards, SFTTrainer):
    """Trains on rows of `input_ids` and `labels`.

    Args:
        model: a causal language model, with a peft adapter unless everything is trained.
        recipe: how to train.
        rows: the training set; `eval_rows`: the set that `evaluate` measures on.
        tokenizer: trl asks for it; it is never used on the data.
        folder: trl asks for it; nothing is written there.
        callbacks: as transformers has them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        *,
        rows: Dataset,
        eval_rows: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self.recipe = recipe
        with float32_masters(model):
            super().__init__(
                model=model,
                args=SFTConfig(
                    max_length=None,  # rows are already cut
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **options(recipe, folder, len(rows)),
                ),
                data_collator=functools.partial(pad_rows, pad_id=pad_id),
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=tokenizer,
                callbacks=callbacks,
            )

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """With trl's fused head, as in training."""
        return model(**inputs, fused_lm_head=True)

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """The loss over trained tokens, and how many there are."""
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
        return {
            "loss": -float(outputs.log_probs.double().sum()),
            "count": int((batch["labels"][:, 1:] != IGNORE).sum()),
        }

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        loss = totals["loss"] / totals["count"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
