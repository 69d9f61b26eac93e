"""Tiny random models of every graph that can be written as GGUF, each with a tokenizer of its family's kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TEXT = (
    "Once upon a time there was a small model. It liked the other models, and they liked it too!\n"
    "The other day it said: \"I'm 12345 days old, and I'll be 678 more.\" They didn't believe the model.\n\n"
    "Später kam ein großes Modell; 日本語 and naïve café. The end of the story of the small model.\n"
) * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] }}{%- endgeneration -%}"
    "{% endfor %}"
)


def sentencepiece(prefix: bool):
    """BPE with byte fallback: every pair that makes a token is a merge, in the order of the tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(TEXT.split("\n"), trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces = [*sorted(trained.get_vocab(), key=trained.token_to_id), "▁▁", "▁▁▁"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in pieces
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps]) if prefix else steps[0]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    core.add_special_tokens([AddedToken("<|user|>", normalized=False)])
    core.add_tokens([AddedToken(word, normalized=False) for word in pieces[-2:]])  # as Gemma's are
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def byte_level(regex: str, *, ignore_merges: bool, bos: bool):
    """Byte-level BPE behind a regular expression."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>" if bos else None, eos_token="<|end|>", chat_template=TEMPLATE
    )


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WIDE = {**SMALL, "head_dim": 32}  # heads that are not hidden_size / heads
WINDOWS = {**WIDE, "query_pre_attn_scalar": 32, "sliding_window": 8}
# family -> (config class, options, tokenizer)
FAMILIES = {
    "llama": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}, lambda: sentencepiece(True)),
    "llama-tied-linear": (
        "LlamaConfig",
        {**SMALL, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        lambda: sentencepiece(True),
    ),
    "llama3": (
        "LlamaConfig",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            },
        },
        lambda: byte_level(LLAMA3, ignore_merges=True, bos=True),
    ),
    "mistral": ("MistralConfig", {**WIDE, "sliding_window": None}, lambda: sentencepiece(True)),
    "qwen2": ("Qwen2Config", SMALL, lambda: byte_level(QWEN2, ignore_merges=False, bos=False)),
    "qwen2-yarn": (
        "Qwen2Config",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            },
        },
        lambda: byte_level(QWEN2, ignore_merges=False, bos=False),
    ),
    "qwen3": (
        "Qwen3Config",
        {**SMALL, "head_dim": 128, "tie_word_embeddings": True},
        lambda: byte_level(QWEN2, ignore_merges=False, bos=False),
    ),
    "gemma": ("GemmaConfig", WIDE, lambda: sentencepiece(False)),
    "gemma2": ("Gemma2Config", WINDOWS, lambda: sentencepiece(False)),
    "gemma3": ("Gemma3TextConfig", {**WINDOWS, "num_hidden_layers": 7}, lambda: sentencepiece(False)),
}


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The makers of tokenizers, and what they are made from."""
    return SimpleNamespace(
        sentencepiece=sentencepiece, byte_level=byte_level, LLAMA3=LLAMA3, QWEN2=QWEN2, TEMPLATE=TEMPLATE, TEXT=TEXT
    )


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory) -> Callable[[str], Path]:
    """A family's model folder with its tokenizer, float32. Not to be written to."""
    import transformers

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            name, options, tokenizer_of = FAMILIES[family]
            torch.manual_seed(0)
            tokenizer = tokenizer_of()
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
            rows = len(tokenizer) + 3  # a table that is rounded up
            config = getattr(transformers, name)(**options, **ids, vocab_size=rows, initializer_range=0.2)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms that are all one and biases that are all zero would hide a mistake
                    parameter.data += 0.2 * torch.randn_like(parameter)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder
