"""The engine on Triton's decoder: on a card, or interpreted in the process that `kernels/test_triton.py` starts."""

from __future__ import annotations

import os

import pytest
import torch

import halfbyte as hb
from halfbyte.infer import Engine, SamplingParams
from halfbyte.infer import engine as engine_module

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32 = hb.HalfbyteConfig(block_size=32, compute_dtype=torch.float32)


def test_answers_are_transformers_own(tiny_tokenizer, make_model, tmp_path, monkeypatch):
    """Several requests at a time, so that steps have rows of several slots and rows that fill up."""
    device = "cpu" if INTERPRETED else "cuda"
    if INTERPRETED:
        from halfbyte.kernels.triton.decoder import TritonDecoder

        def interpreted(network, cache, dtype, enter):
            return TritonDecoder(network, cache, dtype), "a CUDA graph, interpreted"

        monkeypatch.setattr(engine_module, "few_rows_decoder", interpreted)
    folder = make_model("qwen3", len(tiny_tokenizer), tmp_path)
    tiny_tokenizer.save_pretrained(folder)
    with Engine(folder, quantization=FLOAT32, dtype="float32", slots=3, device=device) as engine:
        assert "a CUDA graph" in engine.decoder
        prompts = [engine.token_ids(prompt) for prompt in ("bcdefgh" * 6, "a", "xyz", "lmnop")]
        answers = engine.generate(prompts, SamplingParams(max_tokens=3, ignore_end=True))
        for ids, answer in zip(prompts, answers, strict=True):
            given = torch.tensor([ids], device=device)
            output = engine.model.generate(given, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert [choice.token for choice in answer.choices] == output[0, len(ids) :].tolist()
