"""Exact match: the share of prompts whose generated answer is the expected one, to the last letter.

Text is compared with the white space around it removed. Answers are generated greedily, so the number repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.data import Example
from halfbyte.errors import DataError
from halfbyte.infer import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExactMatch:
    """The result.

    Attributes:
        correct: prompts answered exactly.
        count: prompts asked.
        answers: what the model said, in the order of the examples.
    """

    correct: int
    count: int
    answers: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of prompts answered exactly, 0 to 1."""
        return self.correct / self.count


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> ExactMatch:
    """Ask for the last answer of every conversation and compare.

    Raises:
        DataError: an example is no conversation that ends with an answer.
    """
    for example in examples:
        if not example.messages or example.messages[-1]["role"] != "assistant":
            raise DataError(f"{example.where}: exact match needs a conversation that ends with an answer.")
    if not examples:
        raise DataError("exact match needs at least one example.")
    prompts = [example.messages[:-1] for example in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    expected = [example.messages[-1]["content"] for example in examples]
    correct = sum(got.strip() == want.strip() for got, want in zip(answers, expected, strict=True))
    return ExactMatch(correct=correct, count=len(examples), answers=tuple(answers))
