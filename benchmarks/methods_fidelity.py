"""Full fine-tuning, LoRA and QLoRA on the same real model and text: does training on 4-bit weights lose anything?

    python benchmarks/methods_fidelity.py [--seeds 3] [--steps 400]

stories260K, a Llama that has only ever read children's stories, learns from wikitext-2's valid.txt and is measured on
the first 100,000 characters of its test.txt. LoRA and QLoRA have rank 8 on all projections. Everything is computed in
float32. A method's gain is the unquantized model's loss before training less the method's loss after it: QLoRA starts
behind by what quantization costs, and has to make that up. Its learning rates were swept on seed 0 (docs/results.md).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _assets import assets, finish, table
from rich.console import Console

from halfbyte.evaluate import perplexity
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

WINDOW = 256
CHARACTERS = 100_000
LEARNING_RATES = {"full": 3e-3, "lora": 2e-2, "qlora": 2e-2}


def run(method: str, seed: int, steps: int, learning_rate: float, folder: Path) -> dict[str, Any]:
    """Train once; the summary's `before` and `after` hold loss and perplexity."""
    held_out = folder / "test-head.txt"
    if not held_out.exists():
        text = (assets() / "text" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
        held_out.write_text(text[:CHARACTERS], encoding="utf-8")
    recipe = make_recipe(
        {
            "model_name_or_path": str(assets() / "models" / "stories260K"),
            "output_dir": str(folder / f"{method}-{seed}-{learning_rate}"),
            "dataset": str(assets() / "text" / "wikitext-2" / "valid.txt"),
            "eval_dataset": str(held_out),
            "method": method,
            "seed": seed,
            "compute_dtype": "float32",
            "max_length": WINDOW,
            "max_steps": steps,
            "per_device_train_batch_size": 16,
            "learning_rate": learning_rate,
            "lora_r": 8,
            "lora_alpha": 16,
        }
    )

    def evaluator(model: Any, tokenizer: Any, examples: Any) -> dict[str, float]:
        result = perplexity(model, tokenizer, next(iter(examples)).text, max_length=WINDOW, batch_size=16)
        return {"loss": result.loss, "perplexity": result.perplexity}

    return train(recipe, evaluator=evaluator, console=Console(quiet=True))


def main() -> None:
    """Run every method with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--learning-rate", type=float, help="instead of the method's own, for a sweep")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            rate = options.learning_rate or LEARNING_RATES[method]
            runs[method] = [run(method, seed, options.steps, rate, Path(folder)) for seed in range(options.seeds)]
            last = runs[method][-1]
            print(
                f"{method}: {[round(one['after']['loss'], 4) for one in runs[method]]}, {last['seconds']:.0f} s a run"
            )
    report(runs, options)


def report(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print perplexities before and after, and what share of LoRA's gain QLoRA reaches."""
    unquantized = next((one[0]["before"]["loss"] for name, one in runs.items() if name != "qlora"), None)
    rows, gains = [], {}
    for method, results in runs.items():
        after = [one["after"]["perplexity"] for one in results]
        loss = statistics.mean(one["after"]["loss"] for one in results)
        gains[method] = None if unquantized is None else unquantized - loss
        rows.append(
            [
                method,
                f"{results[0]['trained_parameters']:,}",
                f"{results[0]['before']['perplexity']:.3f}",
                f"{statistics.mean(after):.3f}",
                ", ".join(f"{value:.3f}" for value in after),
                "" if gains[method] is None else f"{gains[method]:.4f}",
            ]
        )
    print(
        table(["method", "trained", "perplexity before", "after, mean", "after, by seed", "gain in nats a token"], rows)
    )
    share = gains["qlora"] / gains["lora"] if gains.get("qlora") and gains.get("lora") else None
    if share is not None:
        print(f"\nQLoRA reaches {share:.1%} of LoRA's gain, both from the unquantized model's loss before.")
    losses = {method: [one["after"]["loss"] for one in results] for method, results in runs.items()}
    finish("methods_fidelity", {"steps": options.steps, "loss_after": losses, "gain": gains, "qlora_share": share})


if __name__ == "__main__":
    main()
