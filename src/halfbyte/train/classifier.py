"""transformers' Trainer with the guards of `halfbyte.train.guards`: a model learns the class of a text or of a word.

The loss is the cross-entropy of a class in float32, summed over rows (over words) and divided once, by those of *all*
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

from halfbyte.data import IGNORE, pad_rows
from halfbyte.train.entities import are_entity_tags, entities
from halfbyte.train.guards import Guards, options

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from halfbyte.train.recipe import Recipe

# What is counted for each class: its right answers, and how often it was said plus how often it was so.
RIGHT, SIDES = "right:", "sides:"
# Entities: those that were said and are so, those that were said, those that are so.
BOTH, SAID, TRUE = "entities:both", "entities:said", "entities:true"


class ClassifierTrainer(Guards):
    """Trains on rows of `input_ids` and one label each, or one for each word (see `halfbyte.data.tagged`).

    Args:
        model: a classification model that knows its classes' names, with a peft adapter unless everything is trained.
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
        """The loss over what is labelled, how much got its right class, and how much there is; what F1 is made of."""
        labels = batch["labels"]
        logits = self.forward_again(model, batch).logits.float()
        learnt, found = labels != IGNORE, logits.argmax(-1)
        return {
            "loss": float(cross_entropy(logits[learnt], labels[learnt], reduction="sum")),
            "accuracy": int((found == labels).sum()),
            "count": int(learnt.sum()),
            **self.counts(found, labels, logits.shape[-1]),
        }

    def counts(self, found: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, int]:
        """What F1 is made of, by class; `found` and `labels` are int64 of one shape."""
        learnt, right = labels != IGNORE, labels[found == labels]
        said, true, both = (
            torch.bincount(values, minlength=classes).tolist() for values in (found[learnt], labels[learnt], right)
        )
        return {
            **{f"{RIGHT}{index}": count for index, count in enumerate(both)},
            **{f"{SIDES}{index}": sum(pair) for index, pair in enumerate(zip(said, true, strict=True))},
        }

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """Loss and accuracy, and F1 averaged over the classes that occur, each counting the same.

        F1 of a class is 2 tp / (2 tp + fp + fn): its right answers twice, over how often it was said and was so. Where
        there are two classes, `f1_binary` is that of the second.
        """
        sides = {name.removeprefix(SIDES): total for name, total in totals.items() if name.startswith(SIDES)}
        scores = {index: 2 * totals[RIGHT + index] / total if total else None for index, total in sides.items()}
        known = [score for score in scores.values() if score is not None]
        binary = {"f1_binary": scores["1"] or 0.0} if len(scores) == 2 else {}
        return {**super().means(_without(totals, RIGHT, SIDES)), "f1": sum(known) / len(known), **binary}


class TaggerTrainer(ClassifierTrainer):
    """The same with a label for each word. Where the labels mark entities, F1 is that of entities.

    F1 is then 2 x right / (said + true) over all sentences (micro), and precision and recall go with it, as seqeval has
    them; else it is the mean over the classes.
    """

    def counts(self, found: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, int]:
        """Entities, where labels mark them."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        names = [config.id2label[index] for index in range(classes)]
        if not are_entity_tags(names):
            return super().counts(found, labels, classes)
        totals = dict.fromkeys((BOTH, SAID, TRUE), 0)
        for row, learnt in enumerate(labels != IGNORE):
            said, true = (entities([names[i] for i in side[row][learnt].tolist()]) for side in (found, labels))
            for name, which in ((BOTH, said & true), (SAID, said), (TRUE, true)):
                totals[name] += len(which)
        return totals

    def means(self, totals: Counter[str]) -> dict[str, float]:
        """Loss, accuracy of words, and F1; 0 where there is no entity to find."""
        if TRUE not in totals:
            return super().means(totals)
        both, said, true = (totals[name] for name in (BOTH, SAID, TRUE))
        return {
            **Guards.means(self, _without(totals, BOTH, SAID, TRUE)),
            "precision": both / max(said, 1),
            "recall": both / max(true, 1),
            "f1": 2 * both / max(said + true, 1),
        }


def _without(totals: Counter[str], *prefixes: str) -> Counter[str]:
    return Counter({name: total for name, total in totals.items() if not name.startswith(prefixes)})


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy in nats: the sum over the labels of a micro-batch, over the labels of the whole step.

    Args:
        outputs: with `logits` [rows, classes] or [rows, tokens, classes], of any dtype.
        labels: int64 [rows] or [rows, tokens]; IGNORE is none.
        num_items_in_batch: labels of the step; None: of this micro-batch.
    """
    total = cross_entropy(outputs.logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    return total / ((labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
