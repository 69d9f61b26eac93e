"""Which modules get an adapter, resolved on models without weights."""

from __future__ import annotations

import math

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
    assert check_targets(recipe(target_modules="attention"), outline(config(name))).modules == expected


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
    shapes = outline(config("llama"))
    assert check_targets(recipe(lora_r=16), shapes).modules == "all-linear"
    with pytest.raises(RequestError, match=r"lora_r 17 is above the rank of .*k_proj \(16 x 32\); choose at most 16"):
        check_targets(recipe(lora_r=17), shapes)
    assert check_targets(recipe(lora_r=17, rank_pattern={"k_proj|v_proj": 4}), shapes).modules == "all-linear"
    with pytest.raises(RequestError, match="rank_pattern 'k_porj' matches no module; did you mean 'k_proj'"):
        check_targets(recipe(rank_pattern={"k_porj": 4}), shapes)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
NARROW = {**SIZES, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Its own config, and what all-linear means: modules, parameters, and the routers that it leaves out.
MIXTURES = {
    "Mixtral": ({**SIZES, "intermediate_size": 96, "num_local_experts": 4}, ATTENTION, GATED, ["gate"]),
    "Qwen3Moe": ({**NARROW, "head_dim": 16}, ATTENTION, GATED, ["gate"]),
    "GptOss": (
        {**SIZES, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16},
        ATTENTION,
        GATED,
        ["router"],
    ),
    # As many features in its shared expert as there are experts, as in Qwen3-Next: it is no router for that.
    "Qwen2Moe": (
        {**NARROW, "shared_expert_intermediate_size": 6},
        [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        GATED,
        ["shared_expert_gate", "gate"],
    ),
    # Modules with names that peft takes for its experts' (peft#3711), in a dense layer and in shared experts.
    "DeepseekV3": (
        {
            **{key: value for key, value in NARROW.items() if key != "num_experts"},
            **{**LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        },
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        [*GATED, "gate_proj.weight", "up_proj.weight", "down_proj.weight"],
        ["gate"],
    ),
}


# A second matrix in the router's module, which corrects its choice.
ERNIE = {**SIZES, "intermediate_size": 96, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48}
MIXTURES["Ernie4_5_Moe"] = (
    {**ERNIE, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ATTENTION,
    [*GATED, "gate_proj.weight", "up_proj.weight", "down_proj.weight"],
    ["gate"],
)


@pytest.fixture(scope="module")
def mixture():
    import transformers

    made = {}

    def form(family):
        if family not in made:
            made[family] = outline(getattr(transformers, f"{family}Config")(**MIXTURES[family][0], vocab_size=64))
        return made[family]

    return form


@pytest.mark.parametrize("family", MIXTURES)
def test_all_linear_means_the_experts_too_and_no_router(mixture, family):
    """peft's own means either, or neither, or the router as well, by the model's family."""
    _, modules, parameters, routers = MIXTURES[family]
    found = check_targets(recipe(), mixture(family))
    assert (found.modules, found.parameters) == (modules, parameters)
    assert found.summary()["not_adapted"] == routers
    assert set(found.frozen.values()) == {"routers"}


@pytest.mark.parametrize("family", MIXTURES)
def test_peft_puts_adapters_where_the_summary_says(mixture, family):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    found = check_targets(recipe(), mixture(family))
    config = getattr(transformers, f"{family}Config")(**MIXTURES[family][0], vocab_size=64)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        options = {"target_modules": found.modules, "target_parameters": found.parameters, "r": 4}
        adapted = get_peft_model(model, LoraConfig(**options))
    sizes = {
        name: 4 * math.prod(experts) * (rows + columns) for name, (*experts, rows, columns) in found.adapted.items()
    }
    trained = {}
    for name, parameter in adapted.get_base_model().named_parameters():
        if parameter.requires_grad:
            module = name.partition(".lora_")[0]
            trained[module] = trained.get(module, 0) + parameter.numel()
    assert sorted(trained.values()) == sorted(sizes.values())


def test_experts_by_name(mixture):
    form = mixture("Mixtral")
    only = check_targets(recipe(target_modules=[], target_parameters="experts"), form)
    assert (only.modules, only.parameters) == ([], GATED)
    assert only.summary() == {
        "adapted": ["experts.gate_up_proj", "experts.down_proj"],
        "not_adapted": [*ATTENTION, "gate"],
    }
    named = check_targets(recipe(target_modules="attention", target_parameters=["down_proj", "gate.weight"]), form)
    assert named.parameters == ["down_proj", "gate.weight"]
    assert named.summary()["not_adapted"] == ["experts.gate_up_proj"]
    assert "none on experts, 52% of the parameters (experts.gate_up_proj)" in str(named)


@pytest.mark.parametrize("keys", [{"target_modules": "attention"}, {"target_modules": ["q_proj"]}, {}])
def test_experts_that_were_not_asked_for_are_told(mixture, keys):
    keys = keys or {"target_parameters": []}
    found = check_targets(recipe(**keys), mixture("Qwen3Moe"))
    assert found.parameters == []
    assert {"experts.gate_up_proj", "experts.down_proj"} <= set(found.summary()["not_adapted"])
    assert "none on" in str(found) and "of the parameters (experts.gate_up_proj, experts.down_proj)" in str(found)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"target_parameters": ["experts.gate_up_prj"]},
            "target_parameters 'experts.gate_up_prj' matches no weight of experts; did you mean "
            "'mlp.experts.gate_up_proj'",
        ),
        ({"target_modules": ["w1"]}, r"'w1' matches no linear module \(those of experts are target_parameters\)"),
        ({"target_modules": [], "target_parameters": []}, "both empty; name something"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1, .* not for .*gate_up_proj; set lora_dropout: 0, or leave"),
        ({"use_dora": True}, "use_dora is True, .*set use_dora: false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', .*set init_lora_weights: true"),
        ({"lora_r": 65}, r"lora_r 65 is above the rank of .*q_proj \(64 x 64\)"),
        ({"lora_r": 64, "rank_pattern": {"down_proj": 70}}, r"above the rank of .*experts.down_proj \(64 x 96\)"),
        ({"modules_to_save": ["experts"]}, "trains experts whole, .*target_parameters: \\[\\]"),
    ],
)
def test_what_experts_cannot_have_is_one_sentence(mixture, keys, told):
    with pytest.raises(RequestError, match=told):
        check_targets(recipe(**keys), mixture("Mixtral"))


def test_a_model_without_experts_has_no_such_targets():
    form = outline(config("llama"))
    assert check_targets(recipe(), form).parameters == []
    with pytest.raises(RequestError, match="'experts', but the model has none"):
        check_targets(recipe(target_parameters="experts"), form)
    with pytest.raises(RequestError, match="'down_proj' matches no weight of experts; the model has no experts"):
        check_targets(recipe(target_parameters=["down_proj"]), form)
    check_targets(recipe(lora_dropout=0.1, use_dora=True), form)
