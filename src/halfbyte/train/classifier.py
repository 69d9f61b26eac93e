"""transformers' Trainer with the guards of `halfbyte.train.guards`: a model learns to tell classes of text apart.

The loss is the cross-entropy of a row's class in float32, summed over rows and divided once, by the rows of *all*
micro-batches of a step. (A model's own loss is a mean over its micro-batch, and a mean of means is another number where
the last micro-batch is short.)
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from halfbyte.data import pad_rows
from halfbyte.train.guards import Guards, options

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe

# What is counted for each class: its right answers, and how often it was said plus how often it was so.
RIGHT, SIDES = "right:", "sides:"


class ClassifierTrainer(Guards):
    """Trains on rows of `input_ids` and one label each.

    Args:
        model: a sequence classification model, with a peft adapter unless everything is trained.
        recipe: how to train.
        rows: the training set; `eval_rows`: the set that `evaluate` measures on.
        tokenizer: for its pad token only.
        folder: transformers asks for it; nothing is written there.
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
        super().__init__(
            model=model,
            args=TrainingArguments(include_num_input_tokens_seen="non_padding", **options(recipe, folder, len(rows))),
            data_collator=functools.partial(pad_rows, pad_id=tokenizer.pad_token_id),
            train_dataset=rows,
            eval_dataset=eval_rows,
            compute_loss_func=mean_loss,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is not the model's

    def forward_again(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """Without labels."""
        return model(**{name: value for name, value in inputs.items() if name != "labels"})

    def sums(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
        """The loss over rows, how many got their right class, and how many there are; by class, what F1 is made of."""
        labels = batch["labels"]
        logits = self.forward_again(model, batch).logits.float()
        found, classes = logits.argmax(-1), logits.shape[-1]
        right = torch.bincount(labels[found == labels], minlength=classes).tolist()
        sides = (torch.bincount(found, minlength=classes) + torch.bincount(labels, minlength=classes)).tolist()
        return {
            "loss": float(cross_entropy(logits, labels, reduction="sum")),
            "accuracy": sum(right),
            "count": len(labels),
            **{f"{RIGHT}{index}": count for index, count in enumerate(right)},
            **{f"{SIDES}{index}": count for index, count in enumerate(sides)},
        }

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """Loss and accuracy, and F1 averaged over the classes that occur, each counting the same.

        F1 of a class is 2 tp / (2 tp + fp + fn): its right answers twice, over how often it was said and was so.
        """
        plain = Counter({name: total for name, total in totals.items() if not name.startswith((RIGHT, SIDES))})
        counted = {
            name.removeprefix(SIDES): total for name, total in totals.items() if name.startswith(SIDES) and total
        }
        scores = [2 * totals[RIGHT + index] / total for index, total in counted.items()]
        return {**super().means(plain), "f1": sum(scores) / len(scores)}


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy in nats: the sum over the rows of a micro-batch, over the rows of the whole step.

    Args:
        outputs: with `logits` [rows, classes], of any dtype.
        labels: int64 [rows].
        num_items_in_batch: rows of the step; None: of this micro-batch.
    """
    total = cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
