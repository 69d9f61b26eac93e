"""Several processes: gradients, losses and metrics are those of one; one of them writes, and all stop at once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte.cli.main import app

needs_several = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# Eight rows of very unequal length: a mean of the means of two processes would be far from the mean over tokens.
PROGRAM = """
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed

from halfbyte.models import load_model, load_tokenizer
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter
from halfbyte.train.trainer import Trainer

base, result, size, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
lengths = [1, 40, 3, 25, 2, 2, 30, 1]
rows = []
for index, length in enumerate(lengths):
    ids = [1, 3, 10 + index, 2, 4] + [(7 * index + 3 * n) % 90 + 6 for n in range(length)]
    rows.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
recipe = make_recipe({
    "model_name_or_path": str(base), "output_dir": result + ".run", "dataset": "d", "method": "lora",
    "compute_dtype": "float32", "lora_r": 4, "max_steps": 1, "max_grad_norm": 1e9, "logging_steps": 1,
    "per_device_train_batch_size": size, "gradient_accumulation_steps": steps,
})
set_seed(0)
model = add_adapter(load_model(base, dtype=torch.float32), recipe, "all-linear")
for name, parameter in model.named_parameters():  # B starts at zero, and A would then have no gradient
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.process_index == 0:
            named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
            kept = {n: p.grad.clone() for n, p in named if p.grad is not None}
            save_file(kept | {"processes": torch.tensor(args.world_size)}, result)

trainer = Trainer(model, recipe, rows=Dataset.from_list(rows), eval_rows=None, tokenizer=load_tokenizer(base),
                  folder=Path(result + ".run"), callbacks=[Keep()])
trainer.train()
if trainer.args.process_index == 0:
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    save_file(load_file(result) | {"loss": torch.tensor(loss, dtype=torch.float64)}, result)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def free_port():
    """Below those that systems give to sockets by themselves: one of these would be taken until it is used."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def start(base, result, processes, size, steps):
    """Processes that write the gradients before the first step, each of micro-batches of `size`, to `result`."""
    port, started = free_port(), []
    for rank in range(processes):
        several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        several = {name: str(value) for name, value in several.items()} | {"MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (several if processes > 1 else {})
        command = [sys.executable, "-c", PROGRAM, str(base), str(result), str(size), str(steps)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return started


@pytest.mark.slow
@needs_several
def test_two_processes_give_the_gradients_and_the_loss_of_one(tiny_llama, tmp_path):
    cases = {"one": (1, 8, 1), "two": (2, 4, 1), "two_by_two": (2, 2, 2)}
    started = [one for name, case in cases.items() for one in start(tiny_llama, tmp_path / name, *case)]
    try:
        told = [process.communicate(timeout=280)[1] for process in started]
        failed = [(p.returncode, text[-2000:]) for p, text in zip(started, told, strict=True) if p.returncode]
        assert not failed
    finally:
        for process in started:
            process.kill()
    found = {name: load_file(tmp_path / name) for name in cases}
    assert [kept.pop("processes").item() for kept in found.values()] == [1, 2, 2]
    losses = [kept.pop("loss").item() for kept in found.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    wanted = found.pop("one")
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert norm > 0
    for got in found.values():
        assert got.keys() == wanted.keys()
        assert torch.cat([(got[n] - wanted[n]).flatten() for n in wanted]).norm() / norm < 1e-6


@pytest.fixture
def recipe(tiny_llama, write_rows, tmp_path):
    """Writes a recipe: rows of unequal length, seven to measure on, so that no share is whole."""
    rows = [{"prompt": c * (1 + n % 3), "completion": c.upper() * (1 + 5 * n % 13)} for n, c in enumerate("abcdefgh")]
    data, measured = write_rows(rows), write_rows(rows[:7], "eval.jsonl")

    def write(name, **keys):
        fixed = {
            "model_name_or_path": str(tiny_llama),
            "dataset": str(data),
            "eval_dataset": str(measured),
            "output_dir": str(tmp_path / name),
            "compute_dtype": "float32",
            "lora_r": 4,
            "learning_rate": 1e-3,
            "max_length": 32,
            "max_steps": 3,
            "logging_steps": 1,
            "samples": 0,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**fixed, **keys}))
        return path

    return write


@pytest.fixture
def launch(tmp_path):
    """Starts `halfbyte train` in two processes by torchrun."""
    program = tmp_path / "main.py"
    program.write_text("from halfbyte.cli.main import main\n\nmain()\n")
    started = []

    def start(*arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*torchrun, str(program), "train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # killed, torchrun leaves its processes behind
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.communicate()


def logs(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@needs_several
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "keys"), [("sft", {"method": "qlora"}), ("dpo", {"task": "preference", "method": "qlora"})]
)
def test_a_run_of_two_processes_is_that_of_one_with_twice_the_accumulation(
    recipe, launch, tmp_path, write_rows, name, keys
):
    if name == "dpo":
        pairs = [{"prompt": c, "chosen": c * 3, "rejected": c.upper() * (1 + n % 4)} for n, c in enumerate("abcdefgh")]
        keys = {**keys, "dataset": str(write_rows(pairs)), "eval_dataset": str(write_rows(pairs[:7], "pairs.jsonl"))}
    process = launch(recipe("two", **keys))
    one = CliRunner().invoke(app, ["train", str(recipe("one", gradient_accumulation_steps=2, **keys))])
    assert one.exit_code == 0, one.output
    out, told = process.communicate(timeout=250)
    assert process.returncode == 0, told
    assert out.count("peak memory") == 1  # one of them reports
    assert told.count("step 3/3") == 1
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["before"].keys() == summaries[1]["before"].keys()
    for when in ("before", "after"):
        assert summaries[1][when] == pytest.approx(summaries[0][when], rel=1e-5, abs=1e-6)
    losses = [[log["loss"] for log in logs(tmp_path / run) if "loss" in log] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    assert not (tmp_path / "two.unfinished").exists()


@pytest.mark.slow
@needs_several
@pytest.mark.timeout(900)
def test_two_processes_stop_after_the_same_step_and_go_on_to_the_same_bits(recipe, launch, tmp_path):
    """One of them alone gets the signal."""
    keys = {"max_steps": 24, "save_steps": 4, "lora_dropout": 0.2}
    whole = launch(recipe("whole", **keys))
    _, told = whole.communicate(timeout=250)
    assert whole.returncode == 0, told
    stopped = launch(recipe("run", **keys))
    first, deadline = tmp_path / "run.unfinished" / "checkpoint-4", time.monotonic() + 200
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = max(psutil.Process(stopped.pid).children(), key=lambda child: int(child.environ()["RANK"]))
    second.send_signal(signal.SIGTERM)
    _, told = stopped.communicate(timeout=100)
    assert stopped.returncode != 0
    assert not (tmp_path / "run").exists()
    assert "halfbyte: stopped by SIGTERM after step" in told
    kept = {path.name for path in (tmp_path / "run.unfinished").glob("checkpoint-*")}
    alone = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--resume"])
    assert alone.exit_code == 2
    assert "was begun in 2 processes, and now there are 1" in alone.stderr
    assert {path.name for path in (tmp_path / "run.unfinished").glob("checkpoint-*")} == kept
    again = launch(tmp_path / "run.yaml", "--resume")
    _, told = again.communicate(timeout=250)
    assert again.returncode == 0, told
    found, wanted = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@needs_several
def test_what_is_wrong_is_said_once_and_ends_both(recipe, launch, tmp_path):
    process = launch(recipe("run", lora_r=10_000))
    _, told = process.communicate(timeout=250)
    assert process.returncode != 0
    assert told.count("lora_r") == 1, told
    assert not list(tmp_path.glob("run*/"))


def test_several_processes_without_a_launcher_are_a_sentence(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["train", str(recipe("run"))])
    assert result.exit_code == 2
    assert "WORLD_SIZE is 2, but RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT" in result.stderr
    assert len(result.stderr.splitlines()) == 1
