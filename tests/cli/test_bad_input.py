"""Every wrong request: exit code 2, one sentence that names the thing, no traceback, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from halfbyte.cli.main import app

ROW = {"prompt": "ab", "completion": "cd"}


@dataclass
class Place:
    """A working recipe in a folder of its own, for a case to spoil."""

    folder: Path
    model: Path
    patch: pytest.MonkeyPatch
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        weights = load_file(self.model / "model.safetensors")
        change(weights)
        save_file(weights, self.model / "model.safetensors", metadata={"format": "pt"})


def set_keys(**keys: Any) -> Callable[[Place], None]:
    return lambda place: place.keys.update(keys)


def write_data(text: str) -> Callable[[Place], None]:
    return lambda place: place.data.write_text(text) and None


def truncate(place: Place) -> None:
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(place: Place) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (place.model / "model.safetensors").unlink()
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


def poison(value: float) -> Callable[[Place], None]:
    name = "model.layers.1.mlp.up_proj.weight"
    return lambda place: place.edit_weights(lambda weights: weights[name].view(-1)[5:6].fill_(value) and None)


def fill_output(place: Place) -> None:
    place.output.mkdir()
    (place.output / "mine.txt").write_text("keep")


def no_permission(place: Place) -> None:
    """Tests may run as root, who may write anywhere, so the refusal is the system call's own."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    place.patch.setattr("tempfile.mkdtemp", refuse)


def full_disk(place: Place) -> None:
    from transformers import PreTrainedTokenizerBase

    def fail(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    place.keys["save_steps"] = None  # a checkpoint of the steps that are done would rightly stay
    place.patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)


TRAIN_CASES: dict[str, tuple[Callable[[Place], None], str]] = {
    "unknown key": (set_keys(lora_rank=4), "unknown key 'lora_rank'; did you mean 'lora_r'?"),
    "unknown value": (set_keys(method="qlorra"), "method is 'qlorra', which is not offered; did you mean 'qlora'?"),
    "unknown task": (
        set_keys(task="sequence-clasification"),
        "task is 'sequence-clasification', which is not offered; did you mean 'sequence-classification'?",
    ),
    "no label": (set_keys(task="sequence-classification"), "the columns prompt, completion fit no layout of labelled"),
    "block size": (set_keys(block_size=65), "block_size is 65, which is not offered; the nearest is 64"),
    "missing file": (set_keys(dataset="row.jsonl"), "row.jsonl does not exist; did you mean 'rows.jsonl'?"),
    "empty data": (write_data(""), "rows.jsonl is empty"),
    "missing column": (
        write_data(json.dumps(ROW) + '\n{"prompt": "a"}\n'),
        "line 2: the column 'completion' is missing",
    ),
    "no model": (set_keys(model_name_or_path="./modle"), "modle"),
    "no config": (lambda place: (place.model / "config.json").unlink(), "no config.json"),
    "missing shard": (missing_shard, "model-00001-of-00002.safetensors"),
    "truncated shard": (truncate, "model.safetensors"),
    "NaN": (poison(float("nan")), "model.layers.1.mlp.up_proj.weight"),
    "Inf": (poison(float("inf")), "model.layers.1.mlp.up_proj.weight"),
    "no target": (
        set_keys(target_modules=["q_porj"]),
        "target_modules 'q_porj' matches no linear module; did you mean 'q_proj'",
    ),
    "rank": (set_keys(lora_r=64), "lora_r 64 is above the rank of model.layers.0.self_attn.q_proj (32 x 32)"),
    "max_length": (set_keys(max_length=128), "max_length 128 is above what the model was made for; choose at most 64"),
    "output full": (fill_output, "out exists and is not empty"),
    "no permission": (no_permission, "there is no permission to write"),
    "full disk": (full_disk, "result is full; nothing was kept"),
}


@pytest.fixture
def place(tmp_path, tiny_llama, monkeypatch):
    folder = tmp_path / "case"
    folder.mkdir()
    model = folder / "model"
    shutil.copytree(tiny_llama, model)
    made = Place(folder, model, monkeypatch)
    made.data.write_text(json.dumps(ROW) + "\n")
    made.keys = {
        "model_name_or_path": "model",
        "output_dir": "out",
        "dataset": "rows.jsonl",
        "max_steps": 1,
        "max_length": 64,
        "compute_dtype": "float32",
        "lora_r": 2,
    }
    return made


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_train_refuses(place, case):
    spoil, expected = TRAIN_CASES[case]
    spoil(place)
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(json.dumps(place.keys))  # JSON is YAML
    before = sorted(path for path in place.folder.rglob("*"))
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("halfbyte: ")]
    assert len(told) == 1
    assert expected in told[0]
    assert "Traceback" not in result.output
    assert sorted(path for path in place.folder.rglob("*")) == before


def test_the_same_request_unspoiled_succeeds(place):
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(json.dumps(place.keys))
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--block-size", "65"], "65"),
        (["--format", "nf5"], "did you mean 'nf4'"),
        (["--scale-bits", "5"], "--scale-bits 5 is not offered"),
        (["--skip", "q_porj"], "q_porj"),
        (["--compress"], "--compress makes archives only"),
    ],
)
def test_quantize_refuses(place, options, expected):
    result = CliRunner().invoke(app, ["quantize", str(place.model), "-o", str(place.output), *options])
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not place.output.exists()


@pytest.mark.parametrize("size", ["lots", "6", "-1GiB", "6 PiB", "GiB"])
def test_a_size_of_memory_that_is_none(tiny_llama, size):
    result = CliRunner().invoke(app, ["generate", str(tiny_llama), "-p", "a", f"--max-memory={size}"])
    assert result.exit_code == 2, result.output
    assert f"{size!r} is no size of memory; write it like 6GiB or 500MB." in result.output


def test_generate_and_info_name_the_folder_that_is_missing(tmp_path):
    for arguments in (["generate", str(tmp_path / "nowhere"), "-p", "a"], ["info", str(tmp_path / "nowhere")]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert "nowhere" in result.stderr
