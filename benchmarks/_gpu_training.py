"""Training steps of Llamas with random 4-bit weights on a card, beside bitsandbytes + peft and Unsloth."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _gpu_models import SHAPES, llama_config, random_llama, with_adapter, write_folder
from _gpu_verify import first_line

LENGTH = 2048
STEPS, WARM = 6, 2
Line = dict[str, Any]


def training(end: float) -> list[Line]:
    """A step of each shape, until the time is over; peers beside the smaller ones."""
    peers = [name for name, module in (("bitsandbytes", "bitsandbytes"), ("Unsloth", "unsloth")) if find_spec(module)]
    plan = [("7 B", contender, "checkpointed") for contender in ("halfbyte", *peers)]
    plan += [(name, "halfbyte", "checkpointed") for name in ("33 B", "65 B")]
    plan += [("7 B", contender, "offloaded") for contender in ("halfbyte", *peers) if contender != "bitsandbytes"]
    plan += [("65 B", "halfbyte", "offloaded")]
    plan += [(name, "halfbyte", "checkpointed") for name in ("70 B", "13 B", "1 B")]
    plan += [(name, contender, "kept") for contender in ("halfbyte", *peers) for name in ("7 B", "1 B")]
    steps = []
    with tempfile.TemporaryDirectory(prefix="halfbyte-gpu-") as folder:
        for name, contender, activations in plan:
            step: Line = {"model": name, "contender": contender, "activations": activations}
            try:
                if time.monotonic() > end - 45:
                    step["why not"] = "out of time"
                elif contender == "Unsloth":
                    step |= train_unsloth(name, activations, end, Path(folder))
                else:
                    step |= train(name, contender, activations, end)
            except torch.cuda.OutOfMemoryError:
                step["why not"] = "out of memory"
            except Exception as error:
                step["why not"] = first_line(error)
            release()
            steps.append(step)
    note_disagreement(steps)
    return steps


def note_disagreement(steps: list[Line]) -> None:
    """Say so where contenders with equal weights have losses that no order of sums explains: a kernel is wrong."""
    for name in SHAPES:
        with_loss = [step for step in steps if step["model"] == name and "loss" in step]
        losses = [step["loss"] for step in with_loss]
        if not all(abs(loss - losses[0]) < 0.5 for loss in losses):  # nor where one is not a number
            for step in with_loss:
                step["why not"] = f"contenders disagree: loss {step['loss']:.3f}"


def train(name: str, contender: str, activations: str, end: float) -> Line:
    """Tokens a second and peak of steps on one row of `LENGTH` tokens, loading included."""
    release()
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = with_adapter(random_llama(llama_config(name), contender, "cuda"), contender, activations)
    return timed_steps(model, "cuda", end)


def timed_steps(model: Any, device: str, end: float, length: int = LENGTH) -> Line:
    """Steps of AdamW on one row of random tokens, the same ones for every contender."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(32_000, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    ids %= model.config.vocab_size
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    took: list[float] = []
    losses: list[float] = []
    while len(took) < STEPS:
        wait()
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        took.append(time.perf_counter() - began)
        losses.append(loss.item())
        if len(took) > WARM and time.monotonic() > end - 30:
            break
    if not all(loss == loss and abs(loss) < float("inf") for loss in losses):
        raise ValueError(f"the losses are {losses}")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"tokens/s": round(length / min(took[WARM:])), "peak GB": round(peak / 1e9, 2), "loss": losses[0]}


def train_unsloth(name: str, activations: str, end: float, folder: Path) -> Line:
    """The same in a process of its own: importing Unsloth rewrites transformers and peft for everybody in it."""
    release()
    here = folder / name.replace(" ", "")
    if not here.is_dir():
        torch.manual_seed(0)
        write_folder(random_llama(llama_config(name), "halfbyte", "cuda"), here)
        release()
    return in_unsloth(here, activations, end - time.monotonic() - 20, "cuda")


def in_unsloth(folder: Path, activations: str, seconds: float, device: str, length: int = LENGTH) -> Line:
    """What `_gpu_unsloth.py` prints about a model folder, or why it did not."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("_gpu_unsloth.py"))]
    command += [str(folder), activations, f"{seconds:.0f}", device, str(length)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
            env={**os.environ, **offline},
            cwd=folder.parent,  # it writes a folder of compiled modules into the working directory
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"why not": "out of time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if lines:
        result: Line = json.loads(lines[-1])
        return result
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return {"why not": f"its process ended with {done.returncode}: {said[-1][:200] if said else 'it said nothing'}"}


def release() -> None:
    """Give the last model's memory back to the card."""
    gc.collect()
    torch.cuda.empty_cache()
