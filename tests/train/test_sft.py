"""Whole runs: the same code for every method, what a run directory holds, and that a run repeats."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.train.recipe import load_recipe, make_recipe
from halfbyte.train.sft import train

ROWS = [{"prompt": letter, "completion": letter.upper() * n} for n, letter in enumerate("abcdefgh", 1)]


@pytest.fixture
def run(tiny_llama, write_rows, tmp_path):
    def start(name="run", **keys):
        data = str(write_rows(ROWS))
        recipe = make_recipe(
            {
                "model_name_or_path": str(tiny_llama),
                "output_dir": str(tmp_path / name),
                "dataset": data,
                "eval_dataset": data,
                "max_length": 32,
                "compute_dtype": "float32",
                "lora_r": 4,
                "learning_rate": 5e-3,
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "logging_steps": 2,
                **keys,
            }
        )
        return tmp_path / name, train(recipe, console=Console(file=io.StringIO()))

    return start


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "qlora"},
        {"method": "qlora", "compute_dtype": "bfloat16", "gradient_checkpointing": True, "lora_dropout": 0.1},
        {"method": "qlora", "format": "int4", "scale_bits": 6, "target_modules": "attention", "lora_bias": "lora_only"},
        {"method": "qlora", "use_dora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["norm"]},
        {"method": "lora", "compute_dtype": "bfloat16", "use_rslora": True},
        {"method": "qlora", "compute_dtype": "float16", "modules_to_save": ["norm"]},
        {"method": "full", "compute_dtype": "float16", "learning_rate": 1e-3},
        {"method": "full", "compute_dtype": "bfloat16", "learning_rate": 1e-3},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_every_method_learns_and_says_what_it_cost(run, keys):
    folder, summary = run(**keys)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["trained_dtypes"] == ["float32"]
    assert (summary["quantized_share"] > 0.5) == (keys["method"] == "qlora")
    assert json.loads((folder / "summary.json").read_text()) == summary
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "tokens_per_second" in log] == [2, 4, 6]
    model = "model.safetensors" if keys["method"] == "full" else "adapter_model.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / model).values())
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt"))


def test_a_run_repeats_from_its_own_recipe(run, tmp_path):
    folder, summary = run(lora_dropout=0.1)
    again = load_recipe(folder / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert train(again, console=Console(file=io.StringIO()))["final_loss"] == summary["final_loss"]
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_reaches_for_no_network(run, monkeypatch):
    """Also not when it saves, which is where others have lost runs (peft#1452)."""
    import socket

    def reach(*args, **_):
        raise AssertionError(f"somebody reaches for {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, reach)
    monkeypatch.setattr(socket.socket, "connect", reach)
    with pytest.raises(AssertionError, match="reaches for"):
        socket.create_connection(("huggingface.co", 443))
    folder, _ = run(modules_to_save=["norm"])
    assert (folder / "adapter_model.safetensors").exists()


def test_the_adapter_loads_in_stock_peft_with_its_tokenizer(run, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = run()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    ids = torch.tensor([[1, 7, 8]])
    plain = base(ids).logits.clone()
    adapted = PeftModel.from_pretrained(base, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    loaded = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not torch.allclose(adapted(ids).logits, plain, atol=1e-2)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    )


def test_plain_text_trains_a_real_model(assets, tmp_path):
    """Also the way of base models: no chat template, a BOS of the tokenizer's own, pad = end token."""
    text = (assets / "text" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")[:30000]
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "eval.txt").write_text(text[:5000])
    recipe = make_recipe(
        {
            "model_name_or_path": str(assets / "models" / "stories260K"),
            "output_dir": str(tmp_path / "run"),
            "dataset": str(tmp_path / "train.txt"),
            "eval_dataset": str(tmp_path / "eval.txt"),
            "max_length": 128,
            "compute_dtype": "float32",
            "lora_r": 8,
            "learning_rate": 5e-3,
            "max_steps": 15,
        }
    )
    summary = train(recipe, console=Console(file=io.StringIO()))
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"] - 0.3
