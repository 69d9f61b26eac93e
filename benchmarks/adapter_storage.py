"""An adapter that is stored in 16 or 4 bits between steps: what does learning lose?

    python benchmarks/adapter_storage.py [--seeds 3] [--steps 100] [--rates 0.002]

The quickstart (a small base that has never met Pig Latin, qlora, float32 products) with each `adapter_dtype`, way of
rounding and learning rate; what is measured is the loss on words that it has not seen. The peer is the first row, the
same run with a float32 adapter.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _assets import finish, table
from rich.console import Console

from halfbyte.train.recipe import load_recipe
from halfbyte.train.sft import train

RECIPE = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16, stochastic": {"adapter_dtype": "bf16"},
    "bf16, nearest": {"adapter_dtype": "bf16", "adapter_rounding": "nearest"},
    "nf4, stochastic": {"adapter_dtype": "nf4"},
    "nf4, nearest": {"adapter_dtype": "nf4", "adapter_rounding": "nearest"},
    "nf4, nearest, error feedback": {
        "adapter_dtype": "nf4",
        "adapter_rounding": "nearest",
        "adapter_error_feedback": True,
    },
}


def loss(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Train once; the summary."""
    keys = {"eval_metric": "loss", "save_steps": "null", **keys}
    recipe = load_recipe(RECIPE, [f"output_dir={folder}", *(f"{key}={value}" for key, value in keys.items())])
    return train(recipe, console=Console(file=io.StringIO()))


def main() -> None:
    """Print a table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    arguments = parser.parse_args()
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in arguments.rates:
            for name, keys in VARIANTS.items():
                found = []
                for seed in range(arguments.seeds):
                    own = {"seed": seed, "max_steps": arguments.steps, "learning_rate": rate, **keys}
                    summary = loss(Path(folder) / f"{name}-{rate}-{seed}", own)
                    found.append(summary["after"]["eval_loss"])
                results[f"{name}, learning rate {rate}"] = found
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                before = f"{summary['before']['eval_loss']:.4f}"
                rows.append([name, f"{rate:g}", before, f"{statistics.mean(found):.4f} ± {spread:.4f}"])
                print(*rows[-1], sep="  ", flush=True)
    print(table(["adapter", "learning rate", "loss before", "loss after"], rows))
    finish("adapter_storage", {"steps": arguments.steps, "seeds": arguments.seeds, "losses": results})


if __name__ == "__main__":
    main()
