"""`halfbyte train`: run a recipe, and say what came out and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe
    from halfbyte.train.sft import Evaluator

ASK = "Talk to it:\n  halfbyte generate {where} --prompt '...'"
ASK_CLASSIFIER = """Ask it, in Python:
  from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline
  model = AutoModelForSequenceClassification.from_pretrained("{where}", config=AutoConfig.from_pretrained("{where}"))
  print(pipeline("text-classification", model, tokenizer="{where}")("..."))"""


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe; may repeat.")
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says, and measure it before and after."""
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import train as run

    loaded = load_recipe(recipe, set_ or [])
    summary = run(loaded, evaluator=_evaluator(loaded))
    _report(loaded, summary)


def _evaluator(recipe: Recipe) -> Evaluator | None:
    """Exact match needs generation, which stands above training; loss and accuracy are the trainer's own."""
    if recipe.eval_metric != "exact_match":
        return None

    def evaluate(model: Any, tokenizer: Any, examples: Any) -> dict[str, float]:
        from halfbyte.evaluate import exact_match

        result = exact_match(
            model,
            tokenizer,
            examples,
            max_new_tokens=recipe.max_new_tokens,
            batch_size=recipe.per_device_eval_batch_size,
        )
        return {"exact_match": result.share, "prompts": result.count}

    return evaluate


def _report(recipe: Recipe, summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", box=box.SIMPLE_HEAD)
    before, after = summary["before"] or {}, summary["after"] or {}
    if "exact_match" in after:
        name = f"exact match, {after['prompts']} unseen prompts"
        table.add_row(name, f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}")
    if "eval_accuracy" in after:
        table.add_row("accuracy on eval_dataset", f"{before['eval_accuracy']:.1%}", f"{after['eval_accuracy']:.1%}")
    if "eval_loss" in after:
        table.add_row("loss on eval_dataset", f"{before['eval_loss']:.4f}", f"{after['eval_loss']:.4f}")
    peak = summary["peak_gpu_memory_bytes"] or summary["peak_memory_bytes"]
    trained, total = summary["trained_parameters"], summary["total_parameters"]
    quantized = f"{summary['quantized_share']:.1%} of them"
    if summary["quantized_share"]:
        quantized += f", {summary['bits_per_quantized_parameter']:.3f} bits each"
    for name, value in (
        ("base, in memory", f"{summary['base_bytes'] / 1e6:,.1f} MB for {total:,} parameters"),
        ("quantized", quantized),
        ("trained parameters", f"{trained:,}"),
        ("peak memory over the idle process", f"{peak / 1e6:,.0f} MB"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['seconds']:,.0f} s"),
    ):
        table.add_row(name, "", value)
    console = Console()
    console.print(table)
    what = "model" if recipe.method == "full" else "adapter"
    where = _short(recipe.output_dir)
    ask = ASK_CLASSIFIER if recipe.task == "sequence-classification" else ASK
    typer.echo(f"The {what} lies in {where}. {ask.format(where=where)}")


def _short(path: str) -> str:
    """Relative to the current directory where it lies below it: what a person would type."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
