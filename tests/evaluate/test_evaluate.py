"""Perplexity per token, whatever the batch; exact match to the letter."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from halfbyte.data import Example
from halfbyte.errors import DataError
from halfbyte.evaluate import exact_match, perplexity


@pytest.fixture
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_counts_every_token_but_each_windows_first(model, tiny_tokenizer, batch_size):
    text = "the quick brown fox jumps over" + "!" * 7  # 37 tokens: 4 windows of 8, and one of 5
    result = perplexity(model, tiny_tokenizer, text, max_length=8, batch_size=batch_size)
    total = 0.0
    for window in torch.tensor(tiny_tokenizer(text)["input_ids"]).split(8):
        log_probs = model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
        total -= log_probs.gather(1, window[1:, None]).sum().item()
    assert result.tokens == 4 * 7 + 4
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_perplexity_needs_two_tokens(model, tiny_tokenizer):
    with pytest.raises(DataError, match="at least 2"):
        perplexity(model, tiny_tokenizer, "a", max_length=8)


def test_exact_match_compares_whole_answers(model, tiny_tokenizer, monkeypatch):
    answers = ["yes", " yes\n", "yes.", "Yes"]
    module = sys.modules["halfbyte.evaluate.exact_match"]  # its name in the package is the function's
    monkeypatch.setattr(module, "generate", lambda *args, **options: answers)
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"})
    result = exact_match(model, tiny_tokenizer, [Example("row", turns)] * 4)
    assert (result.correct, result.count, result.share) == (2, 4, 0.5)
    with pytest.raises(DataError, match="row: exact match needs a conversation that ends with an answer"):
        exact_match(model, tiny_tokenizer, [Example("row", turns[:1])])


def test_real_perplexity_is_plausible(assets):
    """stories260K was trained on TinyStories: its validation loss there is published as about 1.3 nats a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (assets / "text" / "tinystories.txt").read_text()[:20000]
    result = perplexity(model, AutoTokenizer.from_pretrained(folder), text, max_length=256)
    assert 1.0 < result.loss < 2.0
