"""A stopped run that is gone on with gives the same bits as one that was not; what lies on disk is whole or skipped."""

from __future__ import annotations

import errno
import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.errors import CheckpointError, NonFiniteError, OutputError, RequestError, StoppedError
from halfbyte.train import resume, sft
from halfbyte.train.checkpoints import list_checkpoints, newest_good, read_checkpoint
from halfbyte.train.recipe import make_recipe

ROWS = [{"prompt": letter, "completion": letter.upper() * n} for n, letter in enumerate("abcdefghijk", 1)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"].lower()} for r in ROWS]
TEXTS = [{"text": "abcdefgh"[: n % 7 + 1], "label": "odd" if n % 2 else "even"} for n in range(11)]


@pytest.fixture
def make(tiny_llama, write_rows, tmp_path):
    """Recipes of twenty steps over eleven rows: steps of ragged batches, epochs that end in the middle of a step."""

    def start(name="run", **keys):
        rows = {None: ROWS, "preference": PAIRS, "sequence-classification": TEXTS}[keys.get("task")]
        return make_recipe(
            {
                "model_name_or_path": str(tiny_llama),
                "output_dir": str(tmp_path / name),
                "dataset": str(write_rows(rows)),
                "max_length": 32,
                "compute_dtype": "float32",
                "lora_r": 4,
                "lora_dropout": 0.1,
                "learning_rate": 5e-3,
                "max_steps": 20,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "logging_steps": 3,
                "save_steps": 5,
                **keys,
            }
        )

    return start


def train(recipe, **options):
    screen = io.StringIO()
    summary = sft.train(recipe, console=Console(file=screen, width=500), **options)
    return summary, screen.getvalue()


@pytest.fixture
def at_step(monkeypatch):
    """Makes every trainer do something at a step."""

    def plan(step, action):
        create = resume.StopOnSignal

        class Planned(create):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    action(kwargs)
                super().on_step_end(args, state, control, **kwargs)

        monkeypatch.setattr(resume, "StopOnSignal", Planned)
        return lambda: monkeypatch.setattr(resume, "StopOnSignal", create)

    return plan


def kill(_):
    raise KeyboardInterrupt  # not an error that anything here handles: the process ends where it stands


UNLIKE = ("train_runtime", "train_loss", "memory_bytes")  # between two runs that do the same


def results(recipe):
    """What is compared: every weight, and the log without its times."""
    folder = sft.Path(recipe.output_dir)
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (weights,) = folder.glob("*model.safetensors")
    # The mean loss in the last entry is over the steps of this process only, as transformers has it.
    logs = [{k: v for k, v in log.items() if "second" not in k and k not in UNLIKE} for log in logs]
    return load_file(weights), logs


CASES = [
    {"method": "qlora"},
    {"method": "qlora", "compute_dtype": "bfloat16", "gradient_checkpointing": True, "use_dora": True},
    {"method": "qlora", "lora_bias": "all", "modules_to_save": ["norm"], "init_lora_weights": "pissa"},
    {"method": "lora", "compute_dtype": "float16"},
    {"method": "full", "learning_rate": 1e-3},
    {"method": "qlora", "task": "sequence-classification"},
    {"method": "full", "task": "sequence-classification", "learning_rate": 1e-3, "seed": 0},
    {"method": "qlora", "task": "preference"},
    {"method": "lora", "group_by_length": True},
    {"method": "lora", "task": "sequence-classification", "group_by_length": True},
    {"method": "lora", "adapter_dtype": "nf4", "adapter_error_feedback": True, "loraplus_lr_ratio": 8},
]


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: "-".join(str(value) for value in keys.values()))
def test_twenty_steps_are_ten_a_stop_and_ten_more(make, at_step, keys):
    """Stopped at 13, between two checkpoints, two logs and two epochs: three steps are done again."""
    whole = make("whole", **keys)
    train(whole)
    halves = make("halves", **keys)
    back = at_step(13, kill)
    with pytest.raises(KeyboardInterrupt):
        train(halves)
    back()
    summary, _ = train(halves, resume=True)
    assert summary["steps"] == 20
    (wanted, wanted_log), (got, got_log) = results(whole), results(halves)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert wanted_log == got_log
    assert not sft.Path(f"{halves.output_dir}.unfinished").exists()


def test_the_library_pickles_nothing_into_a_checkpoint_and_peft_reads_it(make, at_step, tiny_llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    at_step(13, kill)
    with pytest.raises(KeyboardInterrupt):
        train(make(save_total_limit=1))
    (folder,) = list_checkpoints(tmp_path / "run.unfinished")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint.json",
        "metrics.jsonl",
        "recipe.yaml",
        "state.json",
        "state.safetensors",
        "trainer_state.json",
    ]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(adapted[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_of_that_step(make, at_step, tmp_path, number):
    whole, stopped = make("whole", save_steps=None), make("stopped", save_steps=None)
    train(whole)
    back = at_step(7, lambda _: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(StoppedError, match=rf"{number.name} after step 7 of 20; .*--resume.*checkpoint-7") as caught:
        train(stopped)
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (tmp_path / "stopped").exists()
    back()
    train(stopped, resume=True)
    (wanted, wanted_log), (got, got_log) = results(whole), results(stopped)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert wanted_log == got_log


def test_a_signal_after_the_last_step_loses_nothing(make, monkeypatch):
    """There is no step left at whose end a checkpoint could be written, so the run is let finish."""
    end = resume.StopOnSignal.on_train_end

    def late(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return end(self, *args, **kwargs)

    monkeypatch.setattr(resume.StopOnSignal, "on_train_end", late)
    recipe = make(save_steps=None, max_steps=2)
    assert train(recipe)[0]["steps"] == 2
    assert sft.Path(recipe.output_dir).is_dir()


def test_what_was_measured_before_is_not_measured_again(make, at_step, tmp_path):
    """And a run whose steps are all done is only finished: the weights are those of the last step."""
    data = {"eval_dataset": str(tmp_path / "rows.jsonl")}
    whole, stopped = make("whole", **data), make("stopped", **data)
    wanted, _ = train(whole)
    back = at_step(20, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        train(stopped)
    back()
    got, _ = train(stopped, resume=True)
    timed = {"recipe", "seconds", "tokens_per_second", "peak_memory_bytes"}
    assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in wanted.items() if k not in timed}
    assert got["before"]["eval_loss"] > got["after"]["eval_loss"]
    assert all(torch.equal(results(whole)[0][name], tensor) for name, tensor in results(stopped)[0].items())
    assert train(stopped, resume=True) == (got, f"{stopped.output_dir} is finished already\n")
    with pytest.raises(OutputError, match="not empty"):
        train(stopped)


def test_the_last_ones_and_the_best_are_kept(make, at_step, tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr("halfbyte.train.trainer.Trainer.means", lambda *_: {"loss": next(losses)})
    at_step(19, kill)
    with pytest.raises(KeyboardInterrupt):
        train(make(eval_dataset=str(tmp_path / "rows.jsonl"), eval_steps=4, save_steps=4, save_total_limit=1))
    kept = [read_checkpoint(folder) for folder in list_checkpoints(tmp_path / "run.unfinished")]
    assert [(checkpoint.step, checkpoint.eval_loss) for checkpoint in kept] == [(4, 3.0), (16, 6.0)]


@pytest.fixture
def stopped(make, at_step):
    """A recipe whose run was killed at step 13, with checkpoints at 5 and 10."""
    recipe = make()
    back = at_step(13, kill)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    back()
    return recipe


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_sentence(make, stopped, tmp_path, harm):
    whole = make("whole")
    train(whole)
    newest = tmp_path / "run.unfinished" / "checkpoint-10"
    victim = newest / ("checkpoint.json" if harm == "manifest" else "state.safetensors")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if harm != "flip" else content)
    with pytest.raises(CheckpointError, match="checkpoint-10 is damaged"):
        read_checkpoint(newest)
    _, told = train(stopped, resume=True)
    assert "checkpoint-10 is damaged" in told and "skipped" in told
    assert all(torch.equal(results(whole)[0][name], tensor) for name, tensor in results(stopped)[0].items())


def test_when_none_is_whole_nothing_is_begun_anew_on_its_own(stopped, tmp_path):
    for folder in list_checkpoints(tmp_path / "run.unfinished"):
        (folder / "state.json").unlink()
    with pytest.raises(RequestError, match=r"no checkpoint in .*run.unfinished is whole; remove that folder"):
        train(stopped, resume=True)


def test_an_unfinished_run_is_neither_overwritten_nor_mixed_with_another(make, stopped, tmp_path):
    with pytest.raises(RequestError, match=r"unfinished run of this recipe, 10 steps of it; go on with --resume"):
        train(stopped)
    for choice in (False, True):
        with pytest.raises(RequestError, match=r"another recipe \(learning_rate was 0.005 and is 0.001\)"):
            train(make(learning_rate=1e-3), resume=choice)
    assert newest_good(tmp_path / "run.unfinished", print).step == 10


def test_data_that_was_edited_to_the_same_counts_is_refused_by_name(stopped, tmp_path):
    """Rows and tokens are as many as they were; one answer is another."""
    path = tmp_path / "rows.jsonl"
    was = path.read_text()
    path.write_text(was.replace('"CCC"', '"CXC"'))
    assert path.read_text() != was
    with pytest.raises(
        RequestError, match=r"rows\.jsonl is not what it was when the run in .*run\.unfinished was begun"
    ):
        train(stopped, resume=True)
    path.write_text(was)
    assert train(stopped, resume=True)[0]["steps"] == 20


def test_what_may_not_change_between_two_processes():
    same = {"files": {"a": "1", "b": "2"}, "data": {"rows": 3}}
    resume.check_same_data(same, same, sft.Path("run"))
    for files, named in (({"a": "1", "b": "3"}, "b"), ({"a": "1"}, "b"), ({"a": "1", "b": "2", "c": "4"}, "c")):
        with pytest.raises(RequestError, match=rf"^{named} is not what it was when the run in run was begun"):
            resume.check_same_data(same, {**same, "files": files}, sft.Path("run"))
    with pytest.raises(RequestError, match=r"^the tokenizer"):
        resume.check_same_data(same, {**same, "data": {"rows": 4}}, sft.Path("run"))


def test_two_processes_do_not_share_a_run(stopped, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "run.unfinished" / "lock"), pytest.raises(OutputError, match="another process is at"):
        train(stopped, resume=True)


def test_resume_without_a_run_begins_one_and_says_so(make):
    summary, told = train(make(max_steps=2), resume=True)
    assert "no checkpoint to go on from" in told
    assert summary["steps"] == 2


def test_a_failure_without_a_checkpoint_leaves_nothing(make, at_step, tmp_path):
    at_step(3, kill)
    with pytest.raises(KeyboardInterrupt):
        train(make("new/run"))
    assert not (tmp_path / "new").exists()


def test_a_weight_that_is_not_finite_is_not_saved(make, at_step, tmp_path):
    """The update of step 10 breaks it: the checkpoint of step 5 is the last good one, and is named."""

    def poison(kwargs):
        next(p for n, p in kwargs["model"].named_parameters() if "lora_A" in n).data[0, 0] = float("nan")

    at_step(10, poison)
    with pytest.raises(
        NonFiniteError, match=r"after step 10 the weight .*lora_A.* is not finite.*good .*checkpoint-5\."
    ):
        train(make())
    assert [path.name for path in list_checkpoints(tmp_path / "run.unfinished")] == ["checkpoint-5"]


def test_a_disk_that_is_full_at_the_end_costs_no_steps(make, monkeypatch, tmp_path):
    """The saved files of the result are what no longer fits."""
    write = sft._write

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sft, "_write", fill)
    with pytest.raises(OutputError, match=r"is full.*the last good checkpoint is .*checkpoint-20"):
        train(make())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sft, "_write", write)
    assert train(make(), resume=True)[0]["steps"] == 20


def fake_losses(monkeypatch, values):
    """The evaluation loss is what the test says, at the start and then at each measurement."""
    losses = iter(values)
    monkeypatch.setattr("halfbyte.train.trainer.Trainer.means", lambda *_: {"loss": next(losses)})


EVERY_TWO = {"eval_steps": 2, "save_steps": 5, "save_total_limit": 1}


def test_the_best_weights_are_those_of_the_lowest_loss(make, monkeypatch, tmp_path):
    """Lowest at step 6, which is no step of save_steps: the result is a run of constant learning rate up to there."""
    data = {"eval_dataset": str(tmp_path / "rows.jsonl"), "lr_scheduler_type": "constant", "warmup_ratio": 0}
    fake_losses(monkeypatch, [9.0, 5.0, 4.0, 3.0, 3.5, 3.0, 8.0])
    six = make("six", **data, max_steps=6, save_steps=None)
    train(six)
    fake_losses(monkeypatch, [9.0, 5.0, 4.0, 3.0, 3.5, 3.0, 8.0])
    best = make("best", **data, **EVERY_TWO, max_steps=10, load_best_model_at_end=True)
    summary, _ = train(best)
    assert summary["steps"] == 10
    (wanted, _), (got, _) = results(six), results(best)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_run_stops_when_the_loss_no_longer_falls_also_across_a_resume(make, at_step, monkeypatch, tmp_path):
    """Lowest at step 4, and two measurements of patience: it ends at 8, whether or not it was killed at 7."""
    losses = {0: 9.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.0}
    data = {"eval_dataset": str(tmp_path / "rows.jsonl"), **EVERY_TWO, "early_stopping_patience": 2}
    monkeypatch.setattr(
        "halfbyte.train.trainer.Trainer.means", lambda self, _: {"loss": losses[self.state.global_step]}
    )
    whole, halves = make("whole", **data), make("halves", **data)
    assert train(whole)[0]["steps"] == 8
    back = at_step(7, kill)
    with pytest.raises(KeyboardInterrupt):
        train(halves)
    back()
    assert train(halves, resume=True)[0]["steps"] == 8
    assert all(torch.equal(results(whole)[0][name], tensor) for name, tensor in results(halves)[0].items())


def test_a_run_that_stopped_early_and_was_killed_before_its_end_takes_no_step_more(make, monkeypatch, tmp_path):
    losses = {0: 9.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.0}
    data = {"eval_dataset": str(tmp_path / "rows.jsonl"), **EVERY_TWO, "early_stopping_patience": 2}
    monkeypatch.setattr(
        "halfbyte.train.trainer.Trainer.means", lambda self, _: {"loss": losses[self.state.global_step]}
    )
    write = sft._write
    monkeypatch.setattr(sft, "_write", lambda *_: kill(None))
    with pytest.raises(KeyboardInterrupt):
        train(make(**data))
    monkeypatch.setattr(sft, "_write", write)
    assert train(make(**data), resume=True)[0]["steps"] == 8
