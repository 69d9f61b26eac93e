"""What a run leaves to look at: lines, a plot, answers before and after, and a tracker's files."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from halfbyte.errors import RequestError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import check_request, train
from halfbyte.train.watching import Samples, plot_losses

ROWS = [{"prompt": letter * 2, "completion": letter.upper()} for letter in "abcdef"]


@pytest.fixture
def make(tiny_llama, write_rows, tmp_path):
    def recipe(**keys):
        paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "run")}
        sizes = {"lora_r": 4, "max_steps": 4, "logging_steps": 2, "max_length": 32, "compute_dtype": "float32"}
        return make_recipe({**paths, "dataset": str(write_rows(ROWS)), **sizes, **keys})

    return recipe


def run(recipe, **options):
    screen = io.StringIO()
    summary = train(recipe, console=Console(file=screen, width=300), **options)
    return summary, screen.getvalue()


def asked_of(model, tokenizer, prompts):
    """What stands for generation: it says whether the model has learnt, and repeats the question."""
    moved = sum(float(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n)
    return [f"{'after' if moved else 'before'} {prompt[-1]['content']}" for prompt in prompts]


def test_lines_and_log_have_loss_speed_memory_and_time_left(make, tmp_path):
    _, told = run(make())
    line = r"^step {}/4  loss \d\.\d{{4}}  [\d,]+ tokens/s  \d+\.\d\d GB  {}:\d\d:\d\d left$"
    assert re.search(line.format(2, r"\d+"), told, re.M)
    assert re.search(line.format(4, "0").replace(r":\d\d:\d\d", ":00:00"), told, re.M)
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "tokens_per_second", "memory_bytes", "seconds"} <= log.keys() for log in logs[:2])
    assert logs[0]["memory_bytes"] > 10_000_000


def test_answers_before_and_after(make, tmp_path):
    run(make(samples=2), sampler=asked_of)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert rows == [
        {
            "prompt": [{"role": "user", "content": letter * 2}],
            "expected": letter.upper(),
            "before": f"before {letter * 2}",
            "after": f"after {letter * 2}",
        }
        for letter in "ab"
    ]


def test_no_answers_where_none_are_asked_for(make, tmp_path):
    run(make(samples=0), sampler=asked_of)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_prompts_come_from_what_is_measured_on_and_leave_room(make, write_rows, tiny_tokenizer):
    from halfbyte.data import read_examples, read_preferences

    path = write_rows([{"prompt": "x" * 40, "completion": "y"}, {"prompt": "zz", "completion": "w"}], "eval.jsonl")
    asked = Samples(read_examples(path), 5, tiny_tokenizer, 32)
    assert [prompt[-1]["content"] for prompt in asked.prompts] == ["zz"]
    pairs = write_rows([{"prompt": "p", "chosen": "c", "rejected": "r"}], "pairs.jsonl")
    assert Samples(read_preferences(pairs), 1, tiny_tokenizer, 32).prompts == [({"role": "user", "content": "p"},)]
    text = write_rows([{"text": "only text"}], "text.jsonl")
    assert Samples(read_examples(text), 1, tiny_tokenizer, 32).prompts == []


def test_the_command_answers_greedily(make, tmp_path):
    """Twice the same words: the run's own generation, by the command line."""
    from halfbyte.cli.train import _sampler

    recipe = make(samples=2, max_new_tokens=4)
    run(recipe, sampler=_sampler(recipe))
    first = (tmp_path / "run" / "samples.jsonl").read_text()
    assert len(first.splitlines()) == 2
    again = recipe.model_copy(update={"output_dir": str(tmp_path / "again")})
    run(again, sampler=_sampler(again))
    assert (tmp_path / "again" / "samples.jsonl").read_text() == first


def test_the_loss_is_plotted(make, tmp_path):
    pytest.importorskip("matplotlib")
    run(make())
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.jsonl").write_text('{"step": 4, "train_runtime": 1.0}\n')
    assert not plot_losses(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_told_before_anything_is_loaded(make, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    monkeypatch.setattr("halfbyte.models.load_config", lambda *_: pytest.fail("a config was read"))
    with pytest.raises(RequestError, match=rf"report_to is '{name}', which needs {name}; run `pip install {name}`"):
        check_request(make(report_to=name))


def test_tensorboard_gets_every_log(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = str(tmp_path / "rows.jsonl")
    run(make(report_to="tensorboard", eval_dataset=data))
    folder = tmp_path / "run"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in wanted
    ]
    # Before and after: the writer is opened again for what comes behind the last step.
    assert [e.step for e in events.Scalars("eval/loss")][-1] == 4


def test_wandb_gets_every_log_offline(make, tmp_path):
    """In a process of its own: wandb writes the last of it when the process ends."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    path = tmp_path / "recipe.yaml"
    path.write_text(make(report_to="wandb").to_yaml())
    program = "from halfbyte.cli.main import main; main()"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, "train", str(path)], env=environment, check=True)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    sent = log.read_bytes()  # protobuf: names and values are text in it
    assert b"train/loss" in sent
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 2
    assert all(json.dumps(loss).encode() in sent for loss in losses)
