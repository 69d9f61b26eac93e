"""The keys of a recipe that are about data, in a run: packing, weights, a split, `train_on`, folders."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

ROWS = [{"prompt": "ab"[n % 2] * (1 + n % 3), "completion": "xyz"[n % 3] * (1 + n % 4)} for n in range(16)]


@pytest.fixture
def run(tiny_llama, write_rows, tmp_path):
    def start(name, **keys):
        values = {
            "model_name_or_path": str(tiny_llama),
            "output_dir": str(tmp_path / name),
            "dataset": str(write_rows(ROWS)),
            "max_length": 32,
            "compute_dtype": "float32",
            "lora_r": 4,
            "max_steps": 2,
            "warmup_ratio": 0,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 16,
            "logging_steps": 1,
        }
        summary = train(make_recipe(values | keys), console=Console(file=io.StringIO()))
        logs = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return summary, [log for log in logs if "loss" in log]

    return start


@pytest.mark.parametrize("keys", [{"method": "qlora"}, {"method": "full", "gradient_checkpointing": True}])
def test_packed_rows_train_as_single_rows_do(run, keys):
    """Steps of all rows at once: their losses and gradient norms are equal, the second step's after an update too."""
    single, expected = run("single", **keys)
    packed, found = run("packed", packing=True, **keys)
    assert "16 rows are packed into" in packed["data"]["notes"][0]
    for log, other in zip(found, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert packed["data"]["trained"] == single["data"]["trained"]


def test_rows_that_are_held_out_are_measured_and_not_trained(run):
    summary, _ = run("run", eval_split=4)
    assert summary["data"]["rows"] == 12
    assert summary["before"]["eval_loss"] > 0
    again, _ = run("again", eval_split=0.25)
    assert again["before"] == summary["before"]


def test_sources_are_mixed_by_weight(run, write_rows, tmp_path):
    (tmp_path / "more").mkdir()
    many = write_rows([{"prompt": "c", "completion": "z"}] * 40, "more/many.jsonl")
    summary, _ = run("run", dataset={str(write_rows(ROWS)): 0.8, str(many.parent): 0.2})
    assert summary["data"]["rows"] == 20


def test_train_on_reaches_the_rows(run, write_rows):
    rows = [{"messages": [{"role": role, "content": "ab"} for role in ("user", "assistant") * 2]}] * 4
    path = str(write_rows(rows, "talks.jsonl"))
    trained = {
        train_on: run(train_on, dataset=path, train_on=train_on)[0]["data"]["trained"]
        for train_on in ("completion", "all_assistant", "last_turn", "all")
    }
    assert trained == {"completion": 24, "all_assistant": 24, "last_turn": 12, "all": 80}  # 20 of 21 tokens a row


@pytest.mark.parametrize(
    "name",
    [
        "llama-factory/alpaca_en_demo.json",
        "llama-factory/identity.json",
        "llama-factory/glaive_toolcall_en_demo.json",
        "llama-factory/v1_sft_demo.jsonl",
        "rasbt/instruction-data.json",
    ],
)
def test_real_data_is_trained_on(run, assets, name):
    summary, logs = run(
        "run",
        model_name_or_path=str(assets / "models" / "stories260K"),
        dataset=str(assets / "instruct" / name),
        max_length=256,
        packing=True,
        per_device_train_batch_size=2,
        eval_split=10,
    )
    assert len(logs) == 2
    assert summary["after"]["eval_loss"] > 0
