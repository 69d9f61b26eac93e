"""An adapter trained on 2,000 words, merged in every way: what is left of it?

    python benchmarks/merge_fidelity.py [--words 2000] [--steps 60] [--rank 8]

stories260K learns from the first words of wikitext-2's `valid.txt`, as QLoRA in NF4. The adapter is then merged onto
the decoded 4-bit weights and onto the original ones, into float32, bfloat16, float16 and NF4, and each merge is
compared with the adapter on its base: the KL of the logits over openings from `test.txt`, and how often the same token
is the likeliest. The first row is the base without its adapter: a merge that lost everything.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _assets import assets, finish, table
from rich.console import Console

from halfbyte.cli.merge import adapted, fitted
from halfbyte.evaluate import Parity, parity, perplexity
from halfbyte.models import HalfbyteConfig, Output, Source, load_model, load_tokenizer, merge_adapter
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

OUTPUTS: dict[str, tuple[torch.dtype, HalfbyteConfig | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "NF4, block 64, double quantization": (torch.float32, HalfbyteConfig()),
    "NF4, block 64, float32 scales": (torch.float32, HalfbyteConfig(scale_bits=None)),
    "INT8, block 64": (torch.float32, HalfbyteConfig("int8", scale_bits=None)),
}


def train_adapter(folder: Path, base: Path, words: list[str], arguments: argparse.Namespace) -> Path:
    """QLoRA on the words, in rows of 100; the run directory."""
    rows = [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    keys = {
        "model_name_or_path": str(base),
        "output_dir": str(folder / "run"),
        "dataset": str(data),
        "compute_dtype": "float32",
        "lora_r": arguments.rank,
        "lora_alpha": 2 * arguments.rank,
        "learning_rate": arguments.rate,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 4,
        "save_steps": None,
    }
    train(make_recipe(keys), console=Console(file=io.StringIO()))
    return folder / "run"


def main() -> None:
    """Print a table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--run", type=Path, help="merge the adapter of this run and train none")
    arguments = parser.parse_args()
    base = assets() / "models" / "stories260K"
    text = assets() / "text" / "wikitext-2"
    words = (text / "valid.txt").read_text(encoding="utf-8").split()[: arguments.words]
    unseen = (text / "test.txt").read_text(encoding="utf-8").split()
    prompts = [" ".join(unseen[start : start + 30]) for start in range(0, arguments.prompts * 500, 500)]
    held = " ".join(unseen[10_000:12_000])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = arguments.run or train_adapter(folder, base, words, arguments)
        wanted, without = adapted(str(base), run, prompts)
        rows = [["none: the base without its adapter", "", "", "", *_cells(without), ""]]
        results: dict[str, Any] = {"base without its adapter": without.as_dict()}
        sources = {"decoded NF4 (default)": fitted(str(base), run), "original": Source(str(base))}
        for onto, source in sources.items():
            for what, (dtype, quantization) in OUTPUTS.items():
                path = folder / f"merged-{len(rows)}"
                output = Output(path, dtype, quantization, min_surviving_share=float("-inf"))
                total = merge_adapter(source, run, output)["total"]
                model = load_model(path)
                found = parity(wanted, model)
                text_loss = perplexity(model, load_tokenizer(base), held, max_length=256).perplexity
                cells = [f"{total['surviving_share']:.1%}", f"{total['noise']:.3g}"]
                rows.append([onto, what, *cells, *_cells(found), f"{text_loss:.3f}"])
                print(*rows[-1], sep="  ", flush=True)
                results[f"{onto} -> {what}"] = {"total": total, "parity": found.as_dict(), "perplexity": text_loss}
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    header = ["merged onto", "into", "surviving share", "noise", "KL, nats", "same token", "perplexity, unseen words"]
    print(table(header, rows))
    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    finish("merge_fidelity", {**settings, "final_loss": summary["final_loss"], "merges": results})


def _cells(found: Parity) -> list[str]:
    return [f"{found.kl:.3g}", f"{found.agreement:.1%}"]


if __name__ == "__main__":
    main()
