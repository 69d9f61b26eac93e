"""trl's KTOTrainer with the guards of `halfbyte.train.guards`: a model learns from answers that are judged good or bad.

Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7) needs no pairs. With r the
log-probability of an answer over that of the reference (see `halfbyte.train.reference`), and z the mean of r, at least
0, over answers to other prompts, which says how far the model has moved from the reference at all:

    loss = 1 - sigmoid(beta (r - z)) of a good answer, 1 - sigmoid(beta (z - r)) of a bad one

trl takes the other answers from a batch and so must not shuffle. Here every row is given the answer of the row before
it once and for all, so the order is free. The loss is a mean over the rows of *all* micro-batches of a step; z is that
of a micro-batch while it is trained, as in trl, and of the whole set when it is measured.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from trl import KTOConfig, KTOTrainer

from halfbyte.train import ranks
from halfbyte.train.guards import Guards, float32_masters, options, pad_id, routers_as_configured
from halfbyte.train.reference import REFERENCE, answer_outputs, no_second_adapter, pad_answers, with_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe

KL = "KL_"  # trl's name for what belongs to the answer of another row
COLUMNS = ("ref_logps", "ref_KL_logps")


def collate_judged(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """trl's layout of a batch.

    Args:
        rows: of `data.tokenize_judgments` with `KL_completion_ids`, perhaps with `ref_logps` and `ref_KL_logps`.
        pad_id: any token id.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (1 where a token is trained), int64 [rows, longest], and the
        same of the other answers as `KL_...`; `label`, bool [rows]; `ref_logps` and `ref_KL_logps`, float32 [rows],
        where rows have them.
    """
    batch = {"label": torch.tensor([row["label"] for row in rows])}
    for prefix in ("", KL):
        padded = pad_answers([(row["prompt_ids"], row[f"{prefix}completion_ids"]) for row in rows], pad_id)
        batch |= {prefix + name: values for name, values in padded.items()}
    for name in COLUMNS:
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def with_other_answers(rows: Dataset, longest: int) -> Dataset:
    """The rows with `KL_completion_ids`, the answer of the row before, cut so that prompt and answer fit `longest`."""
    prompts, answers = rows["prompt_ids"][:], rows["completion_ids"][:]
    others = [answers[at - 1][: max(1, longest - len(prompt))] for at, prompt in enumerate(prompts)]
    return rows.add_column(f"{KL}completion_ids", others)


class JudgmentTrainer(Guards, KTOTrainer):
    """Trains on rows of `data.tokenize_judgments`.

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
        self._measured: list[torch.Tensor] = []
        longest = max(len(p) + len(a) for p, a in zip(rows["prompt_ids"], rows["completion_ids"], strict=True))
        sets = {"train": rows, "eval": eval_rows}
        paired = {name: with_other_answers(each, longest) for name, each in sets.items() if each is not None}
        with float32_masters(model), no_second_adapter(model), routers_as_configured(model):
            super().__init__(
                model=model,
                args=KTOConfig(
                    beta=recipe.dpo_beta,
                    max_length=None,  # rows are already cut
                    disable_dropout=not recipe.lora_dropout,  # trl's default would silence what the recipe asks for
                    # For method: full, keeps trl from loading a second model. How is `_precompute_ref_logps`' business.
                    precompute_ref_log_probs=recipe.method == "full",
                    **options(recipe, folder, len(rows)),
                ),
                data_collator=functools.partial(collate_judged, pad_id=pad_id(tokenizer)),
                train_dataset=paired["train"],
                eval_dataset=paired.get("eval"),
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        self.args.train_sampling_strategy = "random"  # see the module's text
        known = {
            name: with_reference(self, each, folder / f"{name}_{REFERENCE}", COLUMNS, self._log_probabilities)
            for name, each in paired.items()
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
        """Of the answers and of the other answers: [2, rows]."""
        return torch.stack([answer_outputs(model, batch, prefix).log_probs.sum(dim=1) for prefix in ("", KL)])

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """With trl's fused head, as in training."""
        return answer_outputs(model, inputs)

    # the library only hands it on to `compute_loss`
    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[Any], device: torch.device
    ) -> float:
        """Rows of the step in a process, on average: gradients are averaged over the processes."""
        return sum(ranks.gathered(sum(len(batch["label"]) for batch in batch_samples))) / ranks.count()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """trl's mean over the rows of a micro-batch, as its share of the mean over the rows of the step."""
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss if num_items_in_batch is None else loss * (len(inputs["label"]) / num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Guards`; z is that of the whole set."""
        self._measured = []
        return super().evaluate(*args, **kwargs)

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """How many rows there are; their log-ratios are kept, since the loss of a row needs the mean of all."""
        reference = torch.stack([batch[name] for name in COLUMNS])
        ratios = (self._log_probabilities(model, batch) - reference).double()
        self._measured.append(torch.cat([ratios, batch["label"][None].double()]).cpu())
        return {"count": len(batch["label"])}

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """The loss; the share of rows whose answer moved the right way; by how much good answers lead bad ones."""
        ratios, others, label = torch.cat([part for parts in ranks.gathered(self._measured) for part in parts], dim=1)
        good, rest = label == 1, others.mean().clamp(min=0)
        side = torch.where(good, 1.0, -1.0)
        rewards = self.beta * ratios
        margin = rewards[good].mean() - rewards[~good].mean() if 0 < good.sum() < len(good) else rewards.new_zeros(())
        return {
            "loss": float((1 - (self.beta * side * (ratios - rest)).sigmoid()).mean()),
            "margin": float(margin),
            "accuracy": float((side * (ratios - rest) > 0).double().mean()),
        }
