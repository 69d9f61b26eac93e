"""Generation in batches: padding changes no answer, and it stops where training stopped."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import RequestError
from halfbyte.infer import generate

PROMPTS = ["a", "bcdefgh" * 3, "bc", "xyz" * 8]


@pytest.fixture
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    # A random tied head repeats the last token; one of its own, without the special tokens, says many different things.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight.data[:6] = 0
    return model


def test_a_batch_answers_as_single_prompts_do_and_in_their_order(model, tiny_tokenizer):
    alone = [generate(model, tiny_tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == alone
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == alone


def test_it_stops_at_the_end_token_of_training_whatever_the_models_config_says(model, tiny_tokenizer):
    """A head that only ever says the end token: were it not heeded, 12 of them would follow."""
    model.generation_config.eos_token_id = 5
    seen = []
    original = type(model).forward

    def end_at_once(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits[..., tiny_tokenizer.eos_token_id] += 1e4
        seen.append(1)
        return output

    model.forward = end_at_once.__get__(model)
    assert generate(model, tiny_tokenizer, ["a", "bcd"], max_new_tokens=12) == ["", ""]
    assert len(seen) == 1


def test_training_mode_is_given_back(model, tiny_tokenizer):
    model.train()
    generate(model, tiny_tokenizer, ["a"], max_new_tokens=1)
    assert model.training


def test_a_prompt_that_fills_the_context_is_refused(model, tiny_tokenizer):
    with pytest.raises(RequestError, match="prompt 2 has 105 tokens; the model's context holds 64"):
        generate(model, tiny_tokenizer, ["a", "b" * 100], max_new_tokens=1)
