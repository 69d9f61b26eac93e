"""What differs between the tasks; `halfbyte.train.sft` is the run that they share.

| task                    | a row is               | the model gets            | the loss is on        |
|---|---|---|---|
| causal-lm               | a conversation, a text | nothing new               | tokens                |
| preference              | two answers            | nothing new               | which one is better   |
| kto                     | a judged answer        | nothing new               | whether it is good    |
| sequence-classification | a text and its label   | a head, one row per class | the class of a text   |
| token-classification    | words and their tags   | a head, one row per class | the class of a word   |

**A new head is trained whole.** The classes of a task are not in any pretrained model, so its head starts from random
numbers. An adapter of low rank beside a random matrix would be no head; packing the matrix would freeze it. So the
head is left unquantized, trained like a weight of full fine-tuning, and saved with the adapter. The same goes for the
pooler, which stands between an encoder and its head and which many checkpoints lack: what is random and not saved
would be another random number when the adapter is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte import env
from halfbyte.data import (
    Examples,
    Renderer,
    Tokenized,
    check_isolation,
    label_names,
    pack,
    read_examples,
    read_judgments,
    read_labelled,
    read_preferences,
    read_tagged,
    tokenize,
    tokenize_judgments,
    tokenize_labelled,
    tokenize_preferences,
    tokenize_tagged,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.train.guards import Guards
    from halfbyte.train.recipe import Recipe


class Task(ABC):
    """The examples of a run, and how they are learnt.

    Args:
        recipe: names the files, which are read here.

    Attributes:
        examples: the training set; `eval_examples`: what is measured on.
        labels: names of the classes; empty where there are none.
        peft_type: what peft calls the task.
        model_task: what kind of model it takes, by `halfbyte.models`' name.
        classifies: whether the answers are classes, for which the model gets a head.

    Raises:
        DataError: see `read_examples` and `read_labelled`.
    """

    peft_type: ClassVar[str]
    model_task: ClassVar[str] = "causal-lm"
    classifies: ClassVar[bool] = False
    labels: tuple[str, ...] = ()
    examples: Examples[Any]
    eval_examples: Collection[Any]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def data_digests(self) -> dict[str, str]:
        """Hashes of the contents of all data files, by name."""
        measured_on = self.eval_examples.digests if isinstance(self.eval_examples, Examples) else {}
        return {**self.examples.digests, **measured_on}

    @abstractmethod
    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Rows of token ids and labels."""

    @abstractmethod
    def trainer(self) -> type[Guards]:
        """The trainer; its library is imported here and not before."""

    @abstractmethod
    def settle(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write into a model's config what only the data knows."""

    @abstractmethod
    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the summary says about the task."""


def _read(read: Callable[..., Examples[Any]], recipe: Recipe) -> tuple[Examples[Any], Collection[Any]]:
    """The training set, and what is measured on."""
    return _held_out(read(recipe.dataset, seed=recipe.seed), read, recipe)


def _held_out(
    examples: Examples[Any], read: Callable[..., Examples[Any]], recipe: Recipe
) -> tuple[Examples[Any], Collection[Any]]:
    """The training set, and what is measured on: rows held out of it, or those of `eval_dataset`."""
    if recipe.eval_split is not None:
        return examples.split(recipe.eval_split, recipe.seed)
    return examples, read(recipe.eval_dataset, seed=recipe.seed) if recipe.eval_dataset else ()


class Writing(Task):
    """causal-lm: supervised fine-tuning on conversations and plain texts."""

    peft_type = "CAUSAL_LM"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.examples, self.eval_examples = _read(read_examples, recipe)

    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """By the tokenizer's chat template."""
        cache = env.cache_folder() / "tokens"
        rows = tokenize(
            examples, Renderer(tokenizer), max_length=max_length, train_on=self.recipe.train_on, cache=cache
        )
        if self.recipe.packing and examples is self.examples:  # what is measured on stays as it is
            rows = pack(rows, max_length, cache=cache)
        return rows

    def trainer(self) -> type[Guards]:
        """trl's, guarded."""
        from halfbyte.train.trainer import Trainer

        return Trainer

    def settle(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing; but a model that would let packed rows see each other is refused."""
        if self.recipe.packing:
            check_isolation(base)

    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Which chat template it was, and a question that the model can be asked afterwards."""
        questions = (
            example.messages[0]["content"] for example in (*self.eval_examples, *self.examples) if example.messages
        )
        return {"chat_template": Renderer(tokenizer).digest, "example_prompt": next(questions, None)}


class Preferring(Task):
    """preference: direct preference optimization on pairs of answers."""

    peft_type = "CAUSAL_LM"
    _read: ClassVar[Callable[..., Examples[Any]]] = staticmethod(read_preferences)

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.examples, self.eval_examples = _read(self._read, recipe)

    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Both answers by the tokenizer's chat template."""
        return tokenize_preferences(examples, Renderer(tokenizer), max_length=max_length)

    def trainer(self) -> type[Guards]:
        """trl's, guarded."""
        from halfbyte.train.preference import PreferenceTrainer

        return PreferenceTrainer

    def settle(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing."""

    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Which chat template it was, and a question that the model can be asked afterwards."""
        pair = next(iter(self.eval_examples or self.examples))
        return {"chat_template": Renderer(tokenizer).digest, "example_prompt": pair.prompt[0]["content"]}


class Judging(Preferring):
    """kto: Kahneman-Tversky optimization on answers that are judged good or bad."""

    _read: ClassVar[Callable[..., Examples[Any]]] = staticmethod(read_judgments)

    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Prompt and answer by the tokenizer's chat template."""
        return tokenize_judgments(examples, Renderer(tokenizer), max_length=max_length)

    def trainer(self) -> type[Guards]:
        """trl's, guarded."""
        from halfbyte.train.judgment import JudgmentTrainer

        return JudgmentTrainer


class Classifying(Task):
    """sequence-classification: one class for each text, or pair of texts."""

    peft_type = "SEQ_CLS"
    model_task = "sequence-classification"
    classifies = True
    _read: ClassVar[Callable[..., Examples[Any]]] = staticmethod(read_labelled)

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        examples = self._read(recipe.dataset, seed=recipe.seed)
        self.labels = recipe.label_names or label_names(examples)  # of one source: those of rows held out, too
        self.examples, self.eval_examples = _held_out(examples, self._read, recipe)

    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """As the encoder was pretrained; no chat template."""
        return tokenize_labelled(examples, tokenizer, self.labels, max_length=max_length)

    def trainer(self) -> type[Guards]:
        """transformers', guarded."""
        from halfbyte.train.classifier import ClassifierTrainer

        return ClassifierTrainer

    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The names of the classes, in order."""
        return {"labels": list(self.labels)}

    def settle(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Name the classes and the pad token.

        A decoder is asked at its last token, which transformers finds by looking for the last that is not the pad
        token: its config has to name the one that batches are padded with.
        """
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        config: Any = base.config
        config.pad_token_id = tokenizer.pad_token_id
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"


class Tagging(Classifying):
    """token-classification: one class for each word."""

    peft_type = "TOKEN_CLS"
    model_task = "token-classification"
    _read = staticmethod(read_tagged)

    def tokenize(self, examples: Collection[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """As the encoder was pretrained, with labels at the first tokens of words."""
        return tokenize_tagged(examples, tokenizer, self.labels, max_length=max_length)

    def trainer(self) -> type[Guards]:
        """transformers', guarded."""
        from halfbyte.train.classifier import TaggerTrainer

        return TaggerTrainer


TASKS: dict[str, type[Task]] = {
    "causal-lm": Writing,
    "preference": Preferring,
    "kto": Judging,
    "sequence-classification": Classifying,
    "token-classification": Tagging,
}
