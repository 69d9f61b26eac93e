"""Tiny random models of the families people bring, made once a session. Not to be written to: copy first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
OPT = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# family -> (config class, its options)
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", GPT2),
    "opt": ("OPTConfig", {**OPT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}),
    "bert": ("BertConfig", SMALL),
}
IDS = torch.tensor([[5, 17, 3, 90, 44, 8, 61], [7, 7, 2, 31, 95, 12, 0]])


def make_model(family: str):
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(getattr(transformers, name)(**options, initializer_range=0.2))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """A family's model folder."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def llama_copy(folder_of, tmp_path) -> Path:
    """A Llama folder that a test may damage."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "llama"))


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Two rows of token ids, [2, 7]."""
    return IDS
