"""trl's DPOTrainer with the guards of `halfbyte.train.guards`: a model learns which of two answers is better.

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7) raises the log-probability of the
chosen answer over that of the rejected one, both relative to a *reference*, the model as it was before:

    loss = -log sigmoid(beta * [(log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))])

The reference is measured once, see `halfbyte.train.reference`. The loss is a mean over the pairs of *all* micro-batches
of a step.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from halfbyte.train import ranks
from halfbyte.train.guards import Guards, float32_masters, options, pad_id, routers_as_configured
from halfbyte.train.reference import REFERENCE, answer_outputs, no_second_adapter, pad_answers, with_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe

SIDES = ("chosen", "rejected")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def collate_pairs(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """trl's layout of a batch: the chosen sides, then the rejected ones.

    Args:
        rows: of `data.tokenize_preferences`, perhaps with `ref_chosen_logps` and `ref_rejected_logps`.
        pad_id: any token id.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (1 where a token is trained), int64 [2 rows, longest];
        `ref_chosen_logps` and `ref_rejected_logps`, float32 [rows], where rows have them.
    """
    batch = pad_answers([(row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES for row in rows], pad_id)
    for side in SIDES:
        if f"ref_{side}_logps" in rows[0]:
            batch[f"ref_{side}_logps"] = torch.tensor([row[f"ref_{side}_logps"] for row in rows])
    return batch


class PreferenceTrainer(Guards, DPOTrainer):
    """Trains on rows of `data.tokenize_preferences`.

    Args:
        model: a causal language model, with a peft adapter unless everything is trained; as it is, it is the reference.
        recipe: how to train.
        rows: the training set; `eval_rows`: the set that `evaluate` measures on.
        tokenizer: trl asks for it; it is never used on the data.
        folder: where the reference is kept for a run that is gone on with.
        callbacks: as transformers has them.
    """

    loss_is_scaled_for_ga = True  # by `compute_loss`

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
        with float32_masters(model), no_second_adapter(model), routers_as_configured(model):
            super().__init__(
                model=model,
                args=DPOConfig(
                    beta=recipe.dpo_beta,
                    max_length=None,  # rows are already cut
                    disable_dropout=not recipe.lora_dropout,  # trl's default would silence what the recipe asks for
                    # For method: full, keeps trl from loading a second model. How is `_precompute_ref_logps`' business.
                    precompute_ref_log_probs=recipe.method == "full",
                    **options(recipe, folder, len(rows)),
                ),
                data_collator=functools.partial(collate_pairs, pad_id=pad_id(tokenizer)),
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        known = {
            name: with_reference(self, each, folder / f"{name}_{REFERENCE}", COLUMNS, self._log_probabilities)
            for name, each in (("train", rows), ("eval", eval_rows))
            if each is not None
        }
        self.train_dataset, self.eval_dataset = known["train"], known.get("eval")
        self.precompute_ref_logps = True  # trl then takes it from the rows

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Nothing: rows arrive tokenized."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        """Not here; trl would hash the weights to name a cache beside the data."""
        return dataset

    def _log_probabilities(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Of the answers: [2, pairs], the chosen ones first."""
        return torch.stack(answer_outputs(model, batch).log_probs.sum(dim=1).chunk(2))

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """With trl's fused head, as in training."""
        return answer_outputs(model, inputs)

    # the library only hands it on to `compute_loss`
    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[Any], device: torch.device
    ) -> float:
        """Pairs of the step in a process, on average: gradients are averaged over the processes."""
        return sum(ranks.gathered(sum(len(batch["input_ids"]) // 2 for batch in batch_samples))) / ranks.count()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """trl's mean over the pairs of a micro-batch, as its share of the mean over the pairs of the step."""
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss if num_items_in_batch is None else loss * (len(inputs["input_ids"]) / 2 / num_items_in_batch)

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """The loss over pairs, by how much and how often the chosen answer leads, and how many pairs there are."""
        reference = torch.stack([batch[f"ref_{side}_logps"] for side in SIDES])
        chosen, rejected = self._log_probabilities(model, batch) - reference
        margins = self.beta * (chosen - rejected).double()
        return {
            "loss": -float(logsigmoid(margins).sum()),
            "margin": float(margins.sum()),
            "accuracy": int((margins > 0).sum()),
            "count": len(margins),
        }
