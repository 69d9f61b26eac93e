"""Perplexity of a plain text.

The text is encoded once and cut into windows of `max_length` tokens that do not overlap. Within a window every token
but the first is predicted from those before it. The sum runs over tokens, in float32 for the softmax and float64 for
the sum, window after window: the result does not depend on the batch size, and no more logits exist than one batch has.

Numbers of different windows or tokenizers do not compare; state `max_length` beside a perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """The result: mean loss in nats a token, its exponential, and how many tokens were predicted."""

    loss: float
    perplexity: float
    tokens: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int,
    batch_size: int = 8,
) -> Perplexity:
    """Measure a causal language model on a text.

    Args:
        model: the model; it is run as it is, in its own dtype.
        tokenizer: its tokenizer; what it puts before a text (a BOS) is put before the first window only.
        text: the text.
        max_length: tokens of a window.
        batch_size: windows that run together.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    import torch

    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2.")
    whole = len(ids) // max_length * max_length
    batches = list(ids[:whole].view(-1, max_length).split(batch_size)) if whole else []
    if len(ids) - whole > 1:
        batches.append(ids[whole:].unsqueeze(0))
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                total += _negative_log_likelihood(model, batch.to(model.device))
                count += batch[:, 1:].numel()
    finally:
        model.train(was_training)
    loss = total / count
    return Perplexity(loss=loss, perplexity=math.exp(loss), tokens=count)


def _negative_log_likelihood(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Summed over all predicted tokens of `ids`, int64 [windows, tokens]."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits
    # One window at a time: the float32 copy of the logits is the largest tensor here.
    sums = [
        cross_entropy(row[:-1].float(), target[1:], reduction="sum") for row, target in zip(logits, ids, strict=True)
    ]
    return sum(float(value) for value in sums)
