"""The random model that whole-model benchmarks share: a Llama of 399 M parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_llama(folder: Path, layers: int, **options: Any) -> None:
    """Write a random Llama in bfloat16: hidden 2048, ffn 5632, 32 heads, 4 kv heads, vocabulary 32,000.

    Args:
        folder: a new one.
        layers: 6 make 399 M parameters.
        options: other fields of its config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
        **options,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
