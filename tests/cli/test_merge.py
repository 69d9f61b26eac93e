"""`halfbyte merge`, `halfbyte adapter` and `halfbyte info ADAPTER` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.models import write_base


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture
def adapter(tiny_llama, tmp_path) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    write_base(tmp_path / "adapter", str(tiny_llama), tiny_llama)
    return tmp_path / "adapter"


def test_merge_tells_and_stores_its_parity(tiny_llama, adapter, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nxyz\n")
    told = run("merge", tiny_llama, adapter, "-o", tmp_path / "out", "--prompts", prompts)
    assert "merged 14 matrices" in told and "100.0% of the adapter's change survives float32" in told
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    parity = report["parity"]
    assert parity["prompts"] == ["abc", "xyz"]
    assert parity["merged"]["kl"] < 1e-9 and parity["merged"]["greedy_agreement"] == 1
    assert parity["base_without_adapter"]["kl"] > 1e-3
    assert run("merge", tiny_llama, adapter, "-o", tmp_path / "out", "--prompts", prompts) == told  # finished already
    told = run("merge", tiny_llama, adapter, "-o", tmp_path / "out.nf4dq", "--min-surviving-share", "-9")
    assert (tmp_path / "out.merge.json").is_file() and "with noise of" in told


def test_a_run_directory_merges_onto_what_it_was_trained_on(tiny_llama, adapter, tmp_path):
    (adapter / "recipe.yaml").write_text(
        json.dumps(
            {
                "model_name_or_path": str(tiny_llama),
                "output_dir": "run",
                "dataset": "none.jsonl",
                "block_size": 32,
                "compute_dtype": "float32",
            }
        )
    )
    (adapter / "summary.json").write_text("{}")
    decoded = run("merge", tiny_llama, adapter, "-o", tmp_path / "decoded")
    assert "decoded from nf4" in decoded
    original = run("merge", tiny_llama, adapter, "-o", tmp_path / "original", "--onto", tiny_llama)
    assert "the adapter was fitted to other weights" in original
    kls = [
        json.loads((tmp_path / name / "merge.json").read_text())["parity"]["merged"]["kl"]
        for name in ("decoded", "original")
    ]
    assert kls[0] < 1e-6 < 1e-4 < kls[1]


def test_info_names_the_base_and_whether_another_is_it(tiny_llama, adapter, tmp_path):
    facts = json.loads(run("info", adapter, "--base", tiny_llama, "--json"))
    assert facts["fits"].startswith("yes: ")
    assert len(facts["matrices"]) == 14 and len(facts["base_sha256"]) == 64
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    assert "is not the base that" in json.loads(run("info", adapter, "--base", tmp_path / "other", "--json"))["fits"]
    refused = call("merge", tmp_path / "other", adapter, "-o", tmp_path / "out")
    assert refused.exit_code == 2 and "is not the base that" in refused.stderr and "--onto" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_pack_measures_and_unpack_gives_a_peft_folder(tiny_llama, adapter, tmp_path):
    told = run("adapter", "pack", adapter, "-o", tmp_path / "a.nf4dq", "--base", tiny_llama)
    assert "relative error of a matrix" in told and "logits: KL" in told
    assert json.loads(run("info", tmp_path / "a.nf4dq", "--json"))["kind"] == "packed adapter"
    run("adapter", "unpack", tmp_path / "a.nf4dq", "-o", tmp_path / "back")
    run("adapter", "combine", tmp_path / "back", adapter, "-o", tmp_path / "sum", "--weights", "1,-1")
    run("adapter", "scale", tmp_path / "sum", "-o", tmp_path / "half", "--factor", "0.5")
    assert torch.tensor([f["norm"] for f in _matrices(tmp_path / "half")]).sum() > 0


def _matrices(folder: Path):
    from halfbyte.models import describe_adapter

    return describe_adapter(folder).values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "BASE", "ADAPTER", "-o", "out", "--dtype", "bf16"], "--dtype bf16"),
        (["merge", "BASE", "ADAPTER", "-o", "out", "--format", "nf5"], "nf5"),
        (["merge", "BASE", "ADAPTER", "-o", "out", "--prompts", "none.txt"], "none.txt cannot be read"),
        (["merge", "BASE", "BASE", "-o", "out"], "has no adapter_config.json"),
        (["merge", "none", "ADAPTER", "-o", "out"], "none"),
        (["adapter", "combine", "ADAPTER", "ADAPTER", "-o", "out", "--weights", "a"], "--weights a"),
        (["adapter", "unpack", "none.nf4dq", "-o", "out"], "none.nf4dq cannot be opened"),
        (["info", "BASE", "--base", "BASE"], "--base asks"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tiny_llama, adapter, tmp_path):
    names = {"BASE": tiny_llama, "ADAPTER": adapter, "out": tmp_path / "out"}
    result = call(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()
