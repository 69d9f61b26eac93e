"""The real data sets, each previewed and trained for a few steps: no row vanishes unsaid, and nothing needs a hand."""

from __future__ import annotations

import io
import json
import math

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

HELD_OUT = 8
SETS = {  # the file, how many rows it holds, what the recipe says about it
    "alpaca": ("llama-factory/alpaca_en_demo.json", 999, {}),
    "identity": ("llama-factory/identity.json", 91, {}),
    "glaive": ("llama-factory/glaive_toolcall_en_demo.json", 300, {"max_length": 512}),
    "messages": ("llama-factory/v1_sft_demo.jsonl", 500, {}),
    "rasbt": ("rasbt/instruction-data.json", 1100, {}),
    "dpo": ("llama-factory/dpo_en_demo.json", 300, {"task": "preference"}),
    "kto": ("llama-factory/kto_en_demo.json", 300, {"task": "kto"}),
    "sst2": ("sst2.tsv", 400, {"task": "sequence-classification"}),
}


@pytest.fixture
def recipe_of(assets, tmp_path):
    def write(name, keys):
        path = assets / "instruct" / name
        if name == "sst2.tsv":  # the first sentences; all of them are 67,349
            lines = (assets / "eval" / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()[:401]
            path = tmp_path / name
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {
            "model_name_or_path": str((assets / "models" / "stories260K").resolve()),
            "output_dir": str(tmp_path / "run"),
            "dataset": str(path.resolve()),
            "eval_split": HELD_OUT,
            "max_length": 256,
            "lora_r": 4,
            "learning_rate": 1e-3,
            "warmup_ratio": 0,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "samples": 0,
            **keys,
        }

    return write


@pytest.mark.parametrize("name", SETS)
def test_it_is_previewed_and_trained(recipe_of, tmp_path, name):
    file, count, keys = SETS[name]
    values = recipe_of(file, keys)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    shown = CliRunner().invoke(app, ["data", str(recipe), "--examples", "1"])
    assert shown.exit_code == 0, shown.output + repr(shown.exception)

    summary = train(make_recipe(values), console=Console(file=io.StringIO()))
    data = summary["data"]
    assert data["rows"] + data["dropped"] == count - HELD_OUT
    assert data["rows"] > 20
    told = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert any(line.split()[:2] == ["rows", f"{data['rows']:,}"] for line in told), shown.stdout
    assert summary["steps"] == 3
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in [*losses, summary["after"]["eval_loss"]])
    # What starts at zero has moved: every layer learned from these rows.
    started_at_zero = [
        weight for key, weight in load_file(tmp_path / "run" / "adapter_model.safetensors").items() if "lora_B" in key
    ]
    assert started_at_zero
    assert all(weight.any() for weight in started_at_zero)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == data
