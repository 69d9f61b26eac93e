"""Does small or paged optimizer state lose anything? The same runs with each kind of state, several seeds.

    python benchmarks/optimizer_fidelity.py [--runs runs.jsonl] [--seeds 3] [--steps 200] [--tasks wikitext quickstart]

wikitext: stories260K, all weights trained on wikitext-2's valid.txt and measured on the first 100,000 characters of its
test.txt, as in methods_fidelity.py. quickstart: examples/quickstart.yaml, measured by the loss on its test words. A
kind of state is within noise when its mean loss differs from float32's by less than the standard error of the
difference of two such means. Parameters under 4096 elements and embeddings keep float32 state; the share of the others
is printed. Each kind is run once more paged to a file, with the first seed: the weights that it saves have to be those
of the unpaged run, byte for byte. Finished runs are kept in `--runs`, so an interrupted campaign goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import methods_fidelity
import torch
from _assets import assets, finish, table
from rich.console import Console

import halfbyte.train.guards as guards
from halfbyte.evaluate import perplexity
from halfbyte.optim import AdamW
from halfbyte.train.recipe import Recipe, load_recipe, make_recipe
from halfbyte.train.sft import train

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
STATES = ("adamw", "adamw_8bit", "adamw_4bit")


def wikitext(seed: int, steps: int, folder: Path, keys: dict[str, str]) -> tuple[Recipe, Any]:
    """The recipe of one run and what measures it."""
    held_out = folder / "test-head.txt"
    if not held_out.exists():
        text = (assets() / "text" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
        held_out.write_text(text[: methods_fidelity.CHARACTERS], encoding="utf-8")
    window = methods_fidelity.WINDOW
    recipe = make_recipe(
        {
            "model_name_or_path": str(assets() / "models" / "stories260K"),
            "dataset": str(assets() / "text" / "wikitext-2" / "valid.txt"),
            "eval_dataset": str(held_out),
            "method": "full",
            "compute_dtype": "float32",
            "max_length": window,
            "per_device_train_batch_size": 16,
            "learning_rate": methods_fidelity.LEARNING_RATES["full"],
            **common(seed, steps, folder, keys),
        }
    )

    def evaluator(model: Any, tokenizer: Any, examples: Any) -> dict[str, float]:
        return {"loss": perplexity(model, tokenizer, next(iter(examples)).text, max_length=window, batch_size=16).loss}

    return recipe, evaluator


def quickstart(seed: int, steps: int, folder: Path, keys: dict[str, str]) -> tuple[Recipe, Any]:
    """The same for the example; its own metric would be an exact match, which is coarser than the loss."""
    changed = {"eval_metric": "loss", **common(seed, steps, folder, keys)}
    return load_recipe(QUICKSTART, [f"{key}={value}" for key, value in changed.items()]), None


def common(seed: int, steps: int, folder: Path, keys: dict[str, str]) -> dict[str, Any]:
    """What every run is told."""
    name = "-".join(map(str, (*keys.values(), seed)))
    return {"output_dir": str(folder / name), "seed": seed, "max_steps": steps, **keys}


def run(task: str, optim: str, paged: str, seed: int, steps: int) -> dict[str, Any]:
    """Loss after training, SHA-256 of the saved weights, and the share of elements whose state is not float32."""
    made: list[AdamW] = []
    original = guards.make_optimizer

    def watched(*arguments: Any) -> Any:
        made.append(original(*arguments))
        return made[-1]

    guards.make_optimizer = watched
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe, evaluator = TASKS[task](seed, steps, Path(folder), {"optim": optim, "paged": paged})
            after = train(recipe, evaluator=evaluator, console=Console(file=io.StringIO()))["after"]
            (weights,) = Path(recipe.output_dir).glob("*model.safetensors")
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    finally:
        guards.make_optimizer = original
    sizes = {p: "exp_avg" in state for p, state in made[-1].state.items()}
    small = sum(p.numel() for p, whole in sizes.items() if not whole) / sum(p.numel() for p in sizes)
    return {"loss": after.get("loss", after.get("eval_loss")), "weights": digest, "share": small}


Key = tuple[Any, ...]  # task, optimizer, paged, seed, steps
TASKS = {"wikitext": wikitext, "quickstart": quickstart}


def main() -> None:
    """Run everything and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="JSON lines of finished runs; appended to")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # results depend on the order of sums, and this fixes it
    finished = read_runs(options.runs)
    results: dict[str, dict[str, list[float]]] = {}
    for task in options.tasks:
        for seed in range(options.seeds):
            for optim in STATES:
                for paged in ("none", "file") if seed == 0 else ("none",):
                    key = (task, optim, paged, seed, options.steps)
                    if key not in finished:
                        finished[key] = run(*key)
                        keep(options.runs, key, finished[key])
        results[task] = report(task, finished, options)
    finish("optimizer_fidelity", {"steps": options.steps, "losses": results})


def read_runs(path: Path | None) -> dict[Key, dict[str, Any]]:
    """The finished runs of a file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    return {tuple(one["run"]): one for one in map(json.loads, lines)}


def keep(path: Path | None, key: Key, result: dict[str, Any]) -> None:
    """Print a finished run, and append it to the file."""
    line = json.dumps({"run": key, **result})
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")


def report(task: str, runs: dict[Key, dict[str, Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Print the table of a task; losses by optimizer. Ends the program where paging changed a byte."""
    found = {
        optim: [runs[task, optim, "none", seed, options.steps] for seed in range(options.seeds)] for optim in STATES
    }
    losses = {optim: [one["loss"] for one in ones] for optim, ones in found.items()}
    rows = []
    for optim, ones in found.items():
        if runs[task, optim, "file", 0, options.steps]["weights"] != ones[0]["weights"]:
            sys.exit(f"{task}: {optim} paged to a file saved other weights than {optim} in memory")
        rows.append([optim, f"{ones[0]['share']:.1%}", *compared(losses["adamw"], losses[optim])])
    print(f"\n{task}, {options.steps} steps; paged to a file, each saves the same bytes\n")
    header = ["optimizer", "elements in low bits", "loss, mean", "by seed", "less float32", "standard error"]
    print(table(header, rows))
    return losses


def compared(base: list[float], losses: list[float]) -> list[str]:
    """Mean, each seed, difference to `base`, and the standard error of a difference of two such means."""
    spread = statistics.stdev(base) if len(base) > 1 else 0.0
    return [
        f"{statistics.mean(losses):.4f}",
        ", ".join(f"{loss:.4f}" for loss in losses),
        f"{statistics.mean(losses) - statistics.mean(base):+.4f}",
        f"{spread * (2 / len(base)) ** 0.5:.4f}",
    ]


if __name__ == "__main__":
    main()
