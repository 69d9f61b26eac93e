"""The commands on a tiny model, from quantizing to talking to the adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli.main import app


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom halfbyte.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_quantize_then_info_counts_bits_from_bytes(tiny_llama, tmp_path):
    told = run("quantize", tiny_llama, "-o", tmp_path / "q", "--block-size", 32, "--scale-bits", "32")
    assert "5.000 bits" in told  # 4 + 32 / 32
    facts = json.loads(run("info", tmp_path / "q", "--json"))
    dense = json.loads(run("info", tiny_llama, "--json"))
    assert facts["parameters"] == dense["parameters"]
    assert dense["quantized_share"] == 0
    assert dense["bits_per_parameter"] == 32
    assert facts["bits_per_quantized_parameter"] == 5.0
    assert 0.5 < facts["quantized_share"] < 1
    assert facts["bits_per_parameter"] == pytest.approx(8 * facts["bytes"] / facts["parameters"], rel=1e-3)


def test_quantize_into_an_archive_and_use_it(tiny_llama, tmp_path):
    archive = tmp_path / "model.nf4dq"
    told = run("quantize", tiny_llama, "-o", archive, "--block-size", 32, "--quantize-embeddings")
    assert "MB/s), peak memory" in told and str(archive) in told
    assert "skipped" not in told  # the head is tied to the embedding, and quantized with it
    facts = json.loads(run("info", archive, "--json"))
    assert facts["kind"] == "archive" and facts["architecture"] == "LlamaForCausalLM"
    assert facts["bytes"] == archive.stat().st_size
    assert facts["tensors"]["model.embed_tokens.weight"]["format"] == "nf4"
    assert facts["tensors"]["lm_head.weight"] == {"same_as": "model.embed_tokens.weight"}
    assert "nf4 block 32 scales 8" in run("info", archive)
    folder = tmp_path / "folder"
    run("quantize", archive, "-o", folder, "--block-size", 32, "--quantize-embeddings")
    answers = [run("generate", model, "-p", "abc", "--max-new-tokens", 4) for model in (archive, folder)]
    assert answers[0] == answers[1]


def test_a_recipe_may_start_from_an_archive(tiny_llama, tmp_path, write_rows):
    run("quantize", tiny_llama, "-o", tmp_path / "base.nf4dq")
    data = write_rows([{"prompt": "a", "completion": "xyz"}])
    recipe = tmp_path / "r.yaml"
    keys = {
        "model_name_or_path": "base.nf4dq",
        "output_dir": "run",
        "dataset": data.name,
        "max_length": 32,
        "compute_dtype": "float32",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 60,
    }
    recipe.write_text(json.dumps(keys))
    run("train", recipe)
    assert run("generate", tmp_path / "run", "-p", "a", "--max-new-tokens", 4).splitlines() == ["xyz"]


def test_compression_is_reported_for_float32_and_float16(tiny_llama, tmp_path):
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    told = run("quantize", tiny_llama, "-o", tmp_path / "model.nf4dq", "--compress")
    bits = json.loads(run("info", tmp_path / "model.nf4dq", "--json"))["bits_per_quantized_parameter"]
    assert f"-> {bits:.3f} bits a quantized parameter, 1/{32 / bits:.2f} of float32 and 1/{16 / bits:.2f} of" in told


def test_train_then_generate_from_the_run_directory(tiny_llama, tmp_path, write_rows):
    """The model learns one answer by heart; the command that the run ends with gives it back."""
    data = write_rows([{"prompt": "a", "completion": "xyz"}, {"prompt": "b", "completion": "uvw"}])
    recipe = tmp_path / "r.yaml"
    keys = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": "run",
        "dataset": data.name,
        "eval_dataset": data.name,
        "eval_metric": "exact_match",
        "max_new_tokens": 8,
        "max_length": 32,
        "compute_dtype": "float32",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 80,
    }
    recipe.write_text(json.dumps(keys))
    told = run("train", recipe)
    assert "0.0%" in told
    assert "100.0%" in told
    assert " generate " in told.splitlines()[-1] and told.rstrip().endswith("--prompt a")  # a question of the data
    assert run("generate", f"{tmp_path / 'run'}/", "-p", "a", "-p", "b").splitlines() == ["xyz", "uvw"]
    assert run("generate", tiny_llama, "--adapter", tmp_path / "run", "-p", "a").splitlines() == ["xyz"]
    facts = json.loads(run("info", tmp_path / "run", "--json"))
    assert facts["base"] == str(tiny_llama)
    assert facts["rank"] == 16


def test_train_a_classifier_then_ask_it_with_the_printed_lines(tiny_llama, tmp_path, write_rows, monkeypatch):
    """Qlora, which loads its base quantized again."""
    data = write_rows([{"text": "abcab", "label": "first"}, {"text": "xyzzy", "label": "last"}])
    recipe = tmp_path / "r.yaml"
    keys = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": "run",
        "dataset": data.name,
        "eval_dataset": data.name,
        "task": "sequence-classification",
        "eval_metric": "accuracy",
        "compute_dtype": "float32",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 20,
    }
    recipe.write_text(json.dumps(keys))
    monkeypatch.chdir(tmp_path)
    told = run("train", recipe)
    accuracy = next(line for line in told.splitlines() if "accuracy on eval_dataset" in line)
    assert accuracy.split()[-1] == "100.0%"
    assert "halfbyte generate" not in told
    lines = told.split("Ask it, in Python:\n")[1]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True)
    assert "'label': 'first'" in done.stdout or "'label': 'last'" in done.stdout, done.stderr
    refused = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "-p", "a"])
    assert refused.exit_code == 2
    assert "run is a classifier (LlamaForSequenceClassification) and writes no answers" in refused.stderr


def test_info_of_the_machine_names_the_kernels():
    facts = json.loads(run("info", "--json"))
    assert facts["kernels"]
    for kind in ("kernels", "parts"):
        assert all(": " in reason for reason in facts[kind].values())
    assert facts["parts"]["norm (cpu)"].startswith("halfbyte: ")
    assert "attention (cuda)" in facts["parts"]
    assert facts["parts"]["decoding (cpu)"].startswith(("native: native kernels, ", "torch: "))
    assert "decoding (cuda)" in facts["parts"]


@pytest.mark.parametrize(
    ("arguments", "place", "advice"),
    [
        (["train", "r.yaml"], "halfbyte.train.recipe.load_recipe", "activation_offloading: true"),
        (["generate", "m", "-p", "a"], "halfbyte.infer.placement.choose_device", "give --device cpu."),
    ],
)
def test_a_full_card_is_a_sentence(monkeypatch, arguments, place, advice):
    def fill(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(place, fill)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("halfbyte: the card has no memory for 1.50 GiB more; ")
    assert advice in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_device_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "-p", "a", "--device", "gpu"])
    assert result.exit_code == 2
    assert result.stderr == "halfbyte: device 'gpu' is not offered; choose cpu, cuda or cuda:NUMBER.\n"


def test_ctrl_c_is_quiet(monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.train.recipe.load_recipe", interrupt)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml")])
    assert result.exit_code == 130
    assert result.output == ""
