"""Which modules get an adapter, resolved on models without weights."""

from __future__ import annotations

import pytest

from halfbyte.errors import RequestError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.targets import check_targets, outline


def recipe(**keys):
    return make_recipe({"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "lora_r": 4} | keys)


def config(name):
    from transformers import BertConfig, GPT2Config, LlamaConfig

    if name == "gpt2":
        return GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    if name == "bert":  # its attention and its feed-forward layer both end in `output.dense`
        return BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, is_decoder=True
        )
    return LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("gpt2", ["c_attn", "attn.c_proj"]),
        ("bert", ["query", "key", "value", "attention.output.dense"]),
    ],
)
def test_attention_is_named_as_shortly_as_is_unambiguous(name, expected):
    assert check_targets(recipe(target_modules="attention"), outline(config(name)).shapes) == expected


def test_shapes_are_output_by_input_also_where_they_are_stored_transposed():
    shapes = outline(config("gpt2")).shapes
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert "lm_head" not in shapes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Bert", {"classifier", "pooler"}),
        ("DistilBert", {"pre_classifier", "classifier"}),
        ("Roberta", {"classifier"}),
        ("DebertaV2", {"pooler", "classifier"}),
        ("Llama", {"score"}),
    ],
)
def test_all_between_a_classifiers_encoder_and_its_answer_is_head(kind, expected):
    import transformers

    made = outline(getattr(transformers, f"{kind}Config")(), "sequence-classification")
    assert set(made.head) == expected
    assert made.shapes
    assert not [name for name in made.shapes if expected & set(name.split("."))]


def test_a_model_that_has_no_such_task_is_refused():
    from transformers import ViTConfig

    with pytest.raises(RequestError, match="task causal-lm is not offered by a model of type 'vit'"):
        outline(ViTConfig())


def test_ranks_are_checked_with_their_patterns():
    shapes = outline(config("llama")).shapes
    assert check_targets(recipe(lora_r=16), shapes) == "all-linear"
    with pytest.raises(RequestError, match=r"lora_r 17 is above the rank of .*k_proj \(16 x 32\); choose at most 16"):
        check_targets(recipe(lora_r=17), shapes)
    assert check_targets(recipe(lora_r=17, rank_pattern={"k_proj|v_proj": 4}), shapes) == "all-linear"
    with pytest.raises(RequestError, match="rank_pattern 'k_porj' matches no module; did you mean 'k_proj'"):
        check_targets(recipe(rank_pattern={"k_porj": 4}), shapes)
