"""Answers to a batch of prompts.

transformers' `generate` does the work. What is added is what goes wrong around it: prompts of unequal length are padded
on the left, so that every answer begins at the same place, and masked by length, so that a pad token that is also the
end token stays visible where it is meant; prompts are rendered by the class that rendered the training data; and
generation stops at the token that ended the answers in training, even where the model's config names another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from halfbyte.data import Message, Renderer
from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
) -> list[str]:
    """Answer prompts.

    Args:
        model: a causal language model; with an adapter, the adapter that is active answers.
        tokenizer: its tokenizer.
        prompts: questions, or conversations that end with the user's turn.
        max_new_tokens: tokens of the longest answer.
        batch_size: prompts that are answered together.
        temperature: 0 takes the likeliest token each time (greedy); above, tokens are drawn.

    Returns:
        One answer for each prompt, in the order of the prompts, without special tokens.

    Raises:
        RequestError: a prompt leaves no room for an answer in the model's context.
    """
    import torch

    renderer = Renderer(tokenizer)
    rows = [renderer.ids(_conversation(prompt), prompt=True) for prompt in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows, 1):
        if limit is not None and len(row) >= limit:
            raise RequestError(f"prompt {number} has {len(row)} tokens; the model's context holds {limit}.")
    # Prompts of similar length together: the less padding, the less is computed for nothing.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                texts = _generate_batch(model, renderer, [rows[i] for i in chosen], max_new_tokens, temperature)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text
    finally:
        model.train(was_training)
    return answers


def _conversation(prompt: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _generate_batch(
    model: PreTrainedModel, renderer: Renderer, rows: list[list[int]], max_new_tokens: int, temperature: float
) -> list[str]:
    import torch
    from transformers import GenerationConfig

    width = max(map(len, rows))
    pad = renderer.stop_ids[0]  # masked wherever it pads, so any id would do
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - width)
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        eos_token_id=renderer.stop_ids,
        pad_token_id=pad,
    )
    output = model.generate(  # type: ignore[operator]  # torch's stubs take any unknown attribute for a tensor
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    return renderer.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
