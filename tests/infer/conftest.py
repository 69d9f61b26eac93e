"""Random models of the families that the engine runs."""

from __future__ import annotations

import pytest
import torch

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _make_model(family: str, vocabulary: int, folder, **options):
    """A random model of a family with shapes that the few-row products take in part."""
    import transformers as t

    kinds = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, {"rope_parameters": ROPE}),
        "mistral": (t.MistralConfig, t.MistralForCausalLM, {"sliding_window": 7, "head_dim": 16}),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, {}),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {"head_dim": 32}),
        "gemma": (t.GemmaConfig, t.GemmaForCausalLM, {"head_dim": 24}),
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    }
    config, kind, own = kinds[family]
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(3)
    dtype = options.pop("dtype", torch.float32)
    model = kind(config(**{**(shape if family != "gpt2" else {"vocab_size": vocabulary}), **own, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not what they begin with
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model():
    """Writes a random model of a family into a folder: (family, vocabulary, folder, **fields of its config, dtype)."""
    return _make_model
