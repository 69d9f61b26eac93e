"""trl's SFTTrainer with the guards of `halfbyte.train.guards`: a model learns to write.

Rows arrive with labels; the loss is summed over labels and divided once, by the number of trained tokens of *all*
micro-batches of a step; the tests hold it to that. It is the model's own (`halfbyte.nn.cross_entropy`) where
`load_model` has given it that one, and trl's fused head for the models that compute more than a projection (capped or
scaled logits, routers' losses where the config asks for them). On a CPU trl's keeps float32 logits of up to 4096
tokens: 512 tokens over 32,000 words took it 0.77 s and 590 MB, the model's own 0.11 s and 40 MB.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTConfig, SFTTrainer

from halfbyte.data import IGNORE, pad_rows
from halfbyte.train.guards import Guards, float32_masters, options, pad_id, routers_as_configured

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe


class ModelLoss(SFTTrainer):
    """trl's trainer that leaves the loss to a model with a chunked one."""

    @property
    def model_has_loss(self) -> bool:
        """Whether the model computes its loss in chunks."""
        model: Any = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with_routers = getattr(
            base.config, "output_router_logits", False
        )  # whose loss the model adds to one with logits
        return not with_routers and getattr(base, "halfbyte_fused", {}).get("loss") == ""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss over trained tokens, and the count of the tokens seen: trl's is wrong for several packed rows."""
        before, count = self._total_train_tokens, self.accelerator.gather(count_tokens(inputs)).sum()
        if self.model_has_loss:
            inputs = {**inputs, "use_cache": False}
            loss = super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            # Asked for here, where a GPU is waited for anyway to look at the loss.
            self._total_train_tokens = before + int(count)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


def count_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens of a batch that are not padding, int64 []."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    # Packed rows: padding has position 0 again and again, and each row that has a position 1 began with one 0.
    positions = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()


class Trainer(Guards, ModelLoss):
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
        self.recipe = recipe
        with float32_masters(model), routers_as_configured(model):
            super().__init__(
                model=model,
                args=SFTConfig(
                    max_length=None,  # rows are already cut
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **options(recipe, folder, len(rows)),
                ),
                data_collator=functools.partial(pad_rows, pad_id=pad_id(tokenizer)),
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=tokenizer,
                callbacks=callbacks,
            )

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """As in training."""
        return model(**inputs) if self.model_has_loss else model(**inputs, fused_lm_head=True)

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """The loss over trained tokens, and how many there are."""
        if self.model_has_loss:
            loss = float(model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss)
        else:
            loss = -float(model(**batch, use_cache=False, fused_lm_head=True).log_probs.double().sum())
        return {"loss": loss, "count": int((batch["labels"][:, 1:] != IGNORE).sum())}

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        loss = totals["loss"] / totals["count"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
