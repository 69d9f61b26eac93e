"""Kill a training run at random moments, resume it, and compare what comes out with a run that was never killed.

    python tools/kill_runs.py [--kills 100] [--seed 0]

The run is a small one (the quickstart's base, qlora, dropout, accumulation, a checkpoint at every step), in a process
that SIGKILL ends: nothing in it can clean up. Half of the kills come at any moment, a quarter while a checkpoint is
being written, a quarter while the result is. After every kill each checkpoint has to be readable; whenever a run comes
to its end, its adapter has to equal the uninterrupted run's bit for bit. Then the next run begins.

Processes are forked from one that has imported everything, so that a kill costs a second and not ten. POSIX only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "quickstart"
STEPS = 8


def keys_of(folder: Path) -> dict[str, Any]:
    """A recipe: eleven rows, steps of two ragged batches, so that epochs end inside of steps."""
    data = folder / "rows.jsonl"
    if not data.exists():
        lines = (EXAMPLE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[:11]), encoding="utf-8")
    return {
        "model_name_or_path": str(EXAMPLE / "base"),
        "output_dir": str(folder / "run"),
        "dataset": str(data),
        "max_length": 64,
        "compute_dtype": "float32",
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "save_steps": 1,
    }


def start(folder: Path) -> int:
    """Fork a process that trains, or goes on; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        import torch
        from rich.console import Console

        from halfbyte.train.recipe import make_recipe
        from halfbyte.train.sft import train

        torch.set_num_threads(1)
        with (folder / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            train(make_recipe(keys_of(folder)), console=Console(file=log), resume=True)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(status)


def kill_at(process: int, folder: Path, aim: str, delay: float) -> bool:
    """Wait for the moment, then kill. False: the process had ended by itself before.

    Args:
        process: its id.
        folder: where it works.
        aim: a pattern of names in the unfinished run; the delay begins when such a name is there. Empty: it begins now.
        delay: seconds.

    Raises:
        RuntimeError: it ended, and not well.
    """
    run, end = folder / "run.unfinished", None if aim else time.monotonic() + delay
    while True:
        if end is None and any(run.glob(aim)):
            end = time.monotonic() + delay
        due = end is not None and time.monotonic() >= end
        if due:
            os.kill(process, signal.SIGKILL)
        ended, status = os.waitpid(process, 0 if due else os.WNOHANG)
        if not ended:
            time.sleep(0.0002)
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        elif status:
            raise RuntimeError(f"a run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
        else:
            return False


def adapter(folder: Path) -> bytes:
    """The finished run's adapter."""
    return (folder / "run" / "adapter_model.safetensors").read_bytes()


def kill_runs(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill `kills` times, and let the last run finish.

    Returns:
        How many runs were finished, how often a kill came at what, and how many checkpoints were checked.

    Raises:
        RuntimeError: a run failed, or its adapter is another one.
        CheckpointError: a checkpoint could not be read.
    """
    from halfbyte.train.checkpoints import list_checkpoints, read_checkpoint

    draw = random.Random(seed)
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    began = time.monotonic()
    kill_at(start(folder / "whole"), folder / "whole", "never", 0.0)
    length = time.monotonic() - began
    wanted, place = adapter(folder / "whole"), folder / "killed"
    seen: Counter[str] = Counter()
    told = {".checkpoint-*": "while a checkpoint was written", ".result.*": "while the result was written"}
    for attempt in itertools.count():
        more = seen["kills"] < kills
        aim = ("", ".checkpoint-*", "", ".result.*")[attempt % 4] if more else "never"
        killed = kill_at(start(place), place, aim, draw.uniform(0, length if not aim else 0.01))
        if killed:
            seen["kills"] += 1
            seen[told.get(aim, "at any moment")] += 1
            for checkpoint in list_checkpoints(place / "run.unfinished"):
                read_checkpoint(checkpoint)
                seen["checkpoints read"] += 1
            continue
        if adapter(place) != wanted:
            raise RuntimeError(f"after {seen['kills']} kills the adapter in {place} is not the uninterrupted run's")
        if (place / "run.unfinished").exists():
            raise RuntimeError(f"{place} holds a finished run and what was left of it unfinished")
        seen["runs finished, all equal"] += 1
        if not more:
            return {"kills": seen.pop("kills"), **seen, "seconds of an uninterrupted run": round(length, 2)}
        shutil.rmtree(place / "run")
    raise AssertionError


def main() -> int:
    """Print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as folder:
        for name, count in kill_runs(Path(folder), arguments.kills, arguments.seed).items():
            print(f"{name}: {count}")
    return 0


def import_everything() -> None:
    """What a forked process then has already."""
    import datasets  # noqa: F401
    import peft  # noqa: F401

    import halfbyte.train.sft
    import halfbyte.train.trainer  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
