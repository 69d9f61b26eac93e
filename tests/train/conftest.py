"""Encoders for the classification tasks."""

from __future__ import annotations

import pytest
import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="session")
def save_bert(tmp_path_factory):
    """Writes a folder with a random BERT (hidden 64, 2 layers), as masked-language-model training leaves it: no pooler.

    `core` makes its tokenizer, from a model whose vocabulary begins with `SPECIAL`.
    """

    def save(core):
        from tokenizers import processors
        from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
        folder = tmp_path_factory.mktemp("tiny_bert")
        PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = BertConfig(
            vocab_size=core.get_vocab_size(), max_position_embeddings=32, initializer_range=0.2, **sizes
        )
        BertForMaskedLM(config).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_bert(save_bert):
    """Of which a token is a letter between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return save_bert(core)


@pytest.fixture(scope="session")
def tiny_subword_bert(save_bert):
    """Of which a token is a letter, the first of a word or a later one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return save_bert(core)
