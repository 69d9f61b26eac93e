"""Trained models in float32: what the engine writes is what transformers' generate writes, token for token.

Random weights make logits whose order hangs on nothing; here it is that of a model that has learnt something, on text
of the kind that it has learnt.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.infer import Engine, SamplingParams
from halfbyte.models import HalfbyteConfig, load_tokenizer

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
STORIES = ("Once upon a time", "Lily and Tom found a big red ball. They", "One day, a little girl named Lily")
COUNT = 100
GREEDY = SamplingParams(max_tokens=COUNT, ignore_end=True)
WEIGHTS = {
    "nf4": HalfbyteConfig(compute_dtype=torch.float32),
    "int8": HalfbyteConfig(format="int8", block_size=32, scale_bits=None, compute_dtype=torch.float32),
    "dense": None,
}


@pytest.fixture(scope="module", params=["stories260K", "babyllama-105", "quickstart"])
def folder_and_prompts(request):
    """A model, and prompts as it knows them, as token ids: short ones, ones that share a beginning, and a long one."""
    if request.param == "quickstart":
        folder = QUICKSTART / "base"
        lines = (QUICKSTART / "data" / "test.jsonl").read_text().splitlines()[:6]
        renderer_input = [json.loads(line)["messages"][:1] for line in lines]
        tokenizer = load_tokenizer(folder)
        prompts = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in renderer_input
        ]
    else:
        folder = request.getfixturevalue("assets") / "models" / request.param
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer(text)["input_ids"] for text in (*STORIES, STORIES[0] + " and", STORIES[0])]
    long = [token for prompt in prompts * 9 for token in prompt][:120]
    return folder, tokenizer, [*prompts, long]


@pytest.fixture(scope="module", params=WEIGHTS)
def model_and_answers(request, folder_and_prompts):
    """The model, and what transformers' generate makes of each prompt alone."""
    folder, tokenizer, prompts = folder_and_prompts
    model = hb.load_model(folder, quantization=WEIGHTS[request.param], dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # The mask, because what is unknown to a vocabulary may have the number that stands for padding.
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    assert all(len(answer) == COUNT for answer in answers)
    assert len({tuple(answer) for answer in answers}) == len({tuple(prompt) for prompt in prompts})
    return model, tokenizer, prompts, answers


def tokens(completions):
    return [[choice.token for choice in completion.choices] for completion in completions]


@pytest.mark.parametrize("slots", [1, 3])
def test_one_at_a_time_and_together_and_with_what_slots_still_hold(model_and_answers, slots):
    model, tokenizer, prompts, answers = model_and_answers
    with Engine(model, tokenizer=tokenizer, dtype="float32", slots=slots) as engine:
        assert engine.decoder.startswith("the native decoder") or "torch operations" in engine.decoder
        assert [tokens(engine.generate([prompt], GREEDY))[0] for prompt in prompts] == answers
        again = engine.generate(prompts, GREEDY)
        assert tokens(again) == answers
        assert sum(completion.cached_tokens for completion in again) > 0


def test_requests_that_come_while_others_are_answered_and_drafts(model_and_answers):
    model, tokenizer, prompts, answers = model_and_answers
    with Engine(model, tokenizer=tokenizer, dtype="float32", slots=4, drafts=5) as engine:
        flows = []
        for prompt in prompts:
            flow = iter(engine.submit(prompt, GREEDY))
            flows.append(chain([next(flow)], flow))  # the next one comes when this one has written a token
        assert [[choice.token for event in flow for choice in event.choices] for flow in flows] == answers
        assert tokens(engine.generate(prompts, GREEDY)) == answers
        assert engine.snapshot().accepted_tokens > 0
