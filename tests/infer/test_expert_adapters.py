"""Adapters on experts in the engine: the tokens of the model's own forward, with and without, side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.infer import Engine, SamplingParams

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "Qwen3Moe": {
        **{"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2},
        "head_dim": 16,
    },
    "GptOss": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROMPTS = [[1, 20, 30, 40], [1, 55, 3], [1, 70, 71, 72, 73, 74, 75]]
TOKENS = 8
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_end=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """A family's folder and two adapters: one on its experts, one on attention only."""
    import transformers

    done = {}

    def make(family):
        if family in done:
            return done[family]
        torch.manual_seed(0)
        words = {"vocab_size": len(tiny_tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], **words)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder / "base")
        tiny_tokenizer.save_pretrained(folder / "base")
        for name, parameters in (("experts", EXPERTS), ("attention", None)):
            base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
            adapted = get_peft_model(
                base,
                LoraConfig(r=4, target_modules=["v_proj"], target_parameters=parameters, task_type="CAUSAL_LM"),
            )
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(parameter)
            adapted.save_pretrained(folder / name)
        done[family] = folder
        return folder

    return make


def load(folder):
    return hb.load_model(folder / "base", quantization=hb.HalfbyteConfig(block_size=32), dtype=torch.float32)


@torch.no_grad()
def greedy(model, prompt):
    """The best token by a whole forward for each, nothing cached."""
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("order", [("experts", "attention"), ("attention", "experts")], ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_with_and_without_expert_adapters_get_their_models_tokens(made, family, order):
    folder = made(family)
    expected = {}
    for name in (None, "experts", "attention"):
        model = load(folder)
        model = (PeftModel.from_pretrained(model, folder / name) if name else model).eval()
        expected[name] = [greedy(model, prompt) for prompt in PROMPTS]
    assert expected["experts"] != expected[None] != expected["attention"]
    with Engine(load(folder), {name: folder / name for name in order}, slots=4) as engine:
        assert engine.decoder.startswith("transformers' own forward, because ")
        asked = [(name, number) for number in range(len(PROMPTS)) for name in expected]
        running = [engine.submit(PROMPTS[number], GREEDY, adapter=name) for name, number in asked]
        for (name, number), handle in zip(asked, running, strict=True):
            assert [choice.token for choice in handle.result().choices] == expected[name][number], (name, number)
        engine.remove_adapter("experts")
        assert [choice.token for choice in engine.generate(PROMPTS[:1], GREEDY)[0].choices] == expected[None][0]
