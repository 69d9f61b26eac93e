"""Adapters on a mixture's experts, from one line of YAML: trained, resumed, read by stock peft, merged, asked."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import halfbyte as hb
from halfbyte.cli.main import app
from halfbyte.train import resume, trainer
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

ROWS = [{"prompt": letter, "completion": letter.upper() * n} for n, letter in enumerate("abcdefgh", 1)]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
FAMILIES = {
    "Mixtral": {"intermediate_size": 128, "num_local_experts": 4},
    "Qwen3Moe": {**NARROW, "num_experts": 6, "head_dim": 16},
    # A dense layer and shared experts, whose names peft takes for those of the experts (peft#3711).
    "DeepseekV3": {
        **{**NARROW, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        "first_k_dense_replace": 1,
    },
}
IDS = torch.tensor([[1, 3, 20, 30, 40, 5], [1, 3, 60, 61, 62, 63]])
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_tokenizer):
    """A family's folder, with a tokenizer."""
    import transformers

    made = {}

    def folder(family):
        if family not in made:
            torch.manual_seed(0)
            words = {"vocab_size": len(tiny_tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
            options = {**SIZES, **FAMILIES[family], **words, "max_position_embeddings": 64}
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def recipe_of(folder_of, write_rows, tmp_path):
    def make(family, name="run", **keys):
        data = str(write_rows(ROWS))
        paths = {"model_name_or_path": str(folder_of(family)), "output_dir": str(tmp_path / name), "dataset": data}
        usual = {"eval_dataset": data, "max_length": 32, "compute_dtype": "float32", "block_size": 32, "lora_r": 4}
        steps = {"learning_rate": 5e-3, "max_steps": 4, "per_device_train_batch_size": 4, "samples": 0}
        return make_recipe({**paths, **usual, **steps, **keys})

    return make


def run(recipe, **options):
    told = io.StringIO()
    return train(recipe, console=Console(file=told, width=1000), **options), told.getvalue()


def base_of(recipe):
    return hb.load_model(recipe.model_name_or_path, quantization=hb.HalfbyteConfig(block_size=32), dtype=torch.float32)


def decoded(model):
    """The same numbers, dense, on transformers' loop: what stock peft is given."""
    model.set_experts_implementation("eager")
    model.dequantize()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_experts_are_stock_pefts_and_merge(recipe_of, family, tmp_path):
    """Of a run with the recipe's defaults: every linear layer, the experts' included."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from halfbyte.models import HalfbyteConfig, Output, Source, merge_adapter

    recipe = recipe_of(family)
    summary, told = run(recipe)
    folder = tmp_path / "run"
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert {"experts.gate_up_proj", "experts.down_proj"} <= set(summary["adapted"])
    assert summary["not_adapted"] == ["gate"]
    assert f"adapter: {summary['trained_parameters']:,} parameters are trained, on " in told
    assert "none on routers (gate)" in told
    with torch.no_grad():
        ours = PeftModel.from_pretrained(base_of(recipe), folder).eval()(IDS).logits
        dense = decoded(base_of(recipe))
        plain = dense(IDS).logits
        theirs = PeftModel.from_pretrained(dense, folder).eval()(IDS).logits
        assert (theirs - plain).norm() > 0.01 * plain.norm()
        assert (ours - theirs).norm() <= 100 * EPS * theirs.norm()
        quantization = HalfbyteConfig("nf4", 32, 8, torch.float32)
        source = Source(recipe.model_name_or_path, quantization, torch.float32)
        report = merge_adapter(source, folder, Output(tmp_path / "merged", torch.float32))
        assert {name for name in report["layers"] if "experts." in name}
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
        assert (merged - theirs).norm() <= 100 * EPS * theirs.norm()


def test_the_file_holds_every_matrix_that_is_trained(recipe_of, tmp_path):
    run(recipe_of("DeepseekV3", max_steps=1))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    expected = {f"{layer}.self_attn.{name}" for layer in (0, 1) for name in attention}
    expected |= {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    expected |= {f"1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    # peft wraps the module of experts twice: the outer one is down_proj's.
    expected |= {"1.mlp.experts", "1.mlp.experts.base_layer"}
    assert {name.partition(".lora_")[0].partition("layers.")[2] for name in saved} == expected


def test_experts_alone(recipe_of, tmp_path):
    summary, told = run(recipe_of("Mixtral", target_modules=[], target_parameters="experts.down_proj", max_steps=2))
    assert summary["adapted"] == ["experts.down_proj"]
    assert summary["trained_parameters"] == 2 * 4 * 4 * (64 + 128)
    assert "none on linear layers (q_proj, k_proj, v_proj, o_proj), experts, 5" in told
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], ["experts.down_proj"])


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_a_run_over_experts_is_resumed_to_the_same_bits(recipe_of, family, tmp_path, monkeypatch):
    keys = {"save_steps": 2, "eval_dataset": [], "gradient_checkpointing": True, "optim": "adamw_8bit"}
    run(recipe_of(family, "whole", **keys))
    stopped = recipe_of(family, "stopped", **keys)
    create = resume.StopOnSignal

    class Stopped(create):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(resume, "StopOnSignal", Stopped)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.setattr(resume, "StopOnSignal", create)
    run(stopped, resume=True)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "lora"},
        {"compute_dtype": "bfloat16", "use_rslora": True, "loraplus_lr_ratio": 4, "adapter_dtype": "nf4"},
        {"rank_pattern": {"gate_up_proj": 2}, "init_lora_weights": "gaussian", "new_tokens": ["[x]"]},
        {"target_modules": "attention", "target_parameters": ["experts.down_proj", "gate.weight"]},
    ],
    ids=str,
)
def test_other_keys_beside_experts(recipe_of, keys):
    summary, _ = run(recipe_of("Mixtral", max_steps=8, **keys))
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["trained_dtypes"] == ["float32"]
    assert "experts.down_proj" in summary["adapted"]


@pytest.mark.parametrize("balanced", [False, True])
def test_the_routers_own_loss_is_learnt_where_the_model_asks_for_it(recipe_of, tmp_path, balanced, monkeypatch):
    """By trl's head then, and by the model's loss without logits else; what is measured is that of the words."""
    recipe = recipe_of("Mixtral", max_steps=2)
    folder = shutil.copytree(recipe.model_name_or_path, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"output_router_logits": balanced, "router_aux_loss_coef": 5.0}
    (folder / "config.json").write_text(json.dumps(config))
    steps = []
    compute = trainer.ModelLoss.compute_loss

    def watched(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        steps.append((self.model_has_loss, float(loss[0] if isinstance(loss, tuple) else loss)))
        return loss

    monkeypatch.setattr(trainer.ModelLoss, "compute_loss", watched)
    summary, _ = run(recipe.model_copy(update={"model_name_or_path": str(folder)}))
    assert [has_loss for has_loss, _ in steps] == 2 * [not balanced]
    # A router's loss of 1 and more in each layer, five times.
    assert (steps[0][1] > summary["before"]["eval_loss"] + 4) == balanced


def test_preferences_over_experts(recipe_of, write_rows):
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["prompt"]} for r in ROWS]
    data = str(write_rows(pairs, "pairs.jsonl"))
    summary, _ = run(recipe_of("Mixtral", task="preference", dataset=data, eval_dataset=data, max_steps=6))
    assert summary["before"]["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)  # the adapter changes nothing yet
    assert summary["after"]["eval_loss"] < 0.6


def test_the_command_says_what_is_wrong_and_writes_nothing(recipe_of, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_of("Mixtral", target_parameters=["experts.gate_proj"]).to_yaml())
    found = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert found.exit_code == 2
    assert found.output.count("\n") == 1
    assert "'experts.gate_proj' matches no weight of experts; did you mean 'mlp.experts.gate_up_proj'" in found.output
    assert not list(tmp_path.glob("run*"))
