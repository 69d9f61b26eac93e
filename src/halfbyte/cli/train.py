"""`halfbyte train`: run a recipe, and say what came out and what it cost."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from halfbyte.train.recipe import Recipe
    from halfbyte.train.sft import Evaluator
    from halfbyte.train.watching import Sampler


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe; may repeat.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the same recipe, if there is one.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says, and measure it before and after."""
    from halfbyte import env
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import train as run

    loaded = load_recipe(recipe, set_ or [])
    summary = run(loaded, evaluator=_evaluator(loaded), sampler=_sampler(loaded), resume=resume)
    if env.rank() == 0:  # of several processes one reports
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


def _sampler(recipe: Recipe) -> Sampler:
    """Greedy answers, one prompt at a time: in a batch, padding may move a number by a rounding and turn a tie."""

    def answer(model: Any, tokenizer: Any, prompts: Any) -> list[str]:
        from halfbyte.infer import generate

        return generate(model, tokenizer, prompts, max_new_tokens=recipe.max_new_tokens, batch_size=1)

    return answer


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
    for key, name in (
        ("eval_f1", "F1 on eval_dataset, " + ("of entities" if "eval_recall" in after else "mean of classes")),
        ("eval_f1_binary", f"F1 of the class {summary.get('labels', [''])[-1]}"),
        ("eval_precision", "precision"),
        ("eval_recall", "recall"),
    ):
        if key in after:
            table.add_row(name, f"{before[key]:.1%}", f"{after[key]:.1%}")
    if "eval_loss" in after:
        table.add_row("loss on eval_dataset", f"{before['eval_loss']:.4f}", f"{after['eval_loss']:.4f}")
    if "eval_margin" in after:
        table.add_row("margin of the chosen answers", f"{before['eval_margin']:.4f}", f"{after['eval_margin']:.4f}")
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
    if "labels" not in summary:
        prompt = shlex.quote(summary["example_prompt"] or "...")
        typer.echo(f"The {what} lies in {where}. Talk to it:\n  {_program()} generate {where} --prompt {prompt}")
    else:
        lines = classifier_lines(recipe, summary["trained_whole"], where)
        typer.echo("\n  ".join([f"The {what} lies in {where}. Ask it, in Python:", *lines]))


def classifier_lines(recipe: Recipe, whole: list[str], where: str) -> list[str]:
    """Python that asks a trained classifier, by stock transformers and peft.

    An adapter was fitted to the base as the run quantized it, so that is how the base is loaded again. A word of
    several tokens has the tag of the first, as it was trained.
    """
    auto, pipeline = {
        "sequence-classification": ("AutoModelForSequenceClassification", '"text-classification"'),
        "token-classification": ("AutoModelForTokenClassification", '"token-classification"'),
    }[recipe.task]
    first = ', aggregation_strategy="first"' if recipe.task == "token-classification" else ""
    if recipe.method == "full":
        return ["from transformers import pipeline", f'print(pipeline({pipeline}, "{where}"{first})("..."))']
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {auto}, pipeline",
        f'base, run, options = "{recipe.model_name_or_path}", "{where}", {{}}',
    ]
    if recipe.method == "qlora":
        encoding = f'"{recipe.format}", {recipe.block_size}, {recipe.scale_bits}, skip_modules={whole}'
        lines += [
            "from halfbyte import HalfbyteConfig",
            f'options["quantization_config"] = HalfbyteConfig({encoding})',
        ]
    return [
        *lines,
        "config = AutoConfig.from_pretrained(run)",
        f"model = {auto}.from_pretrained(base, config=config, **options)",
        f"classify = pipeline({pipeline}, PeftModel.from_pretrained(model, run), tokenizer=run{first})",
        'print(classify("..."))',
    ]


def _program() -> str:
    """What a person types to run this program again: its name where the shell finds it, else the way to it."""
    program = Path(sys.argv[0]).absolute()
    found = shutil.which("halfbyte")
    return "halfbyte" if found and Path(found).absolute() == program else _short(str(program))


def _short(path: str) -> str:
    """Relative to the current directory where it lies below it: what a person would type."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
