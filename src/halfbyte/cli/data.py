"""`halfbyte data`: what a recipe's model would see, before anything is trained. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.data import LengthReport, Oddity, Tokenized
    from halfbyte.train.sft import DataInputs

LETTERS = 2_000  # of a row that are shown


def data(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe; may repeat.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="How many rows to show.")] = 3,
) -> None:
    """Show the data of a recipe as the model sees it: what is trained, how long rows are, which are odd."""
    from rich.console import Console

    from halfbyte import env
    from halfbyte.train.recipe import load_recipe
    from halfbyte.train.sft import check_data

    loaded = load_recipe(recipe, set_ or [])
    if loaded.is_local:
        env.go_offline()
    # Rows are looked at one by one; what packing makes of them is told by the report of the packed ones.
    single = loaded.model_copy(update={"packing": False})
    inputs = check_data(single)
    task = inputs.task
    rows = task.tokenize(task.examples, inputs.tokenizer, inputs.max_length)
    held_out = task.tokenize(task.eval_examples, inputs.tokenizer, inputs.max_length) if task.eval_examples else None
    console = Console(soft_wrap=True, highlight=False)
    _show_rows(console, inputs, rows, examples)
    _show_lengths(console, inputs, rows.report, held_out.report if held_out else None)
    if loaded.packing:
        from halfbyte.data import pack

        console.print(f"{pack(rows, inputs.max_length, cache=env.cache_folder() / 'tokens').report.notes[-1]}.")
    _show_oddities(console, inputs, rows, held_out)


def _show_rows(console: Console, inputs: DataInputs, rows: Tokenized, count: int) -> None:
    """The first rows, and the longest."""
    from rich.text import Text

    from halfbyte.data import shown_answers, shown_row, shown_tags

    labels = inputs.task.labels
    chosen = list(range(min(count, len(rows.dataset))))
    if rows.facts is not None and count:
        chosen.append(int(rows.facts.length.argmax()))
    for index in dict.fromkeys(chosen):
        row = rows.dataset[index]
        longest = ", the longest" if index == chosen[-1] and rows.facts is not None else ""
        prompt = row.get("prompt_ids")
        tokens = len(row["input_ids"]) if prompt is None else len(prompt) + _longest_answer(row)
        console.print(f"[bold]{_origin(inputs, rows, index)}{longest}, {tokens} tokens[/]")
        if prompt is not None:
            text = shown_answers(row, inputs.tokenizer, colour=console.is_terminal)
        elif labels and isinstance(row["labels"], list):
            text = shown_tags(row["input_ids"], row["labels"], labels, inputs.tokenizer)
        elif labels:
            text = Text(str(inputs.tokenizer.decode(row["input_ids"])))
            text.append(f"  -> {labels[row['labels']]}", "bold green")
        else:
            text = shown_row(row["input_ids"], row["labels"], inputs.tokenizer, colour=console.is_terminal)
        if len(text) > LETTERS:
            text = text[:LETTERS].append(f" ... and {len(text) - LETTERS:,} letters more", "italic")
        console.print(text, end="\n\n")
    if "prompt_ids" in rows.dataset.column_names and count:
        console.print(
            "Good answers are green, bad ones red."
            if console.is_terminal
            else "Answers stand in ⟦ ⟧ behind their prompt."
        )
    elif rows.report.trained is not None and count:
        console.print("Trained tokens are green." if console.is_terminal else "Trained tokens stand in ⟦ ⟧.")


def _longest_answer(row: Mapping[str, Any]) -> int:
    return max(len(ids) for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids")


def _origin(inputs: DataInputs, rows: Tokenized, index: int) -> str:
    """The file and line that a row is from; a block of text may be from several."""
    if rows.facts is None and rows.report.dropped:  # which ones, is not known
        return f"row {index + 1}"
    position = index if rows.facts is None else int(rows.facts.origin[index])
    return "a block of text" if position < 0 else str(next(iter(inputs.task.examples.take([position]))).where)


def _show_lengths(console: Console, inputs: DataInputs, train: LengthReport, held_out: LengthReport | None) -> None:
    from rich import box
    from rich.table import Table

    from halfbyte.data import count_labels

    table = Table("", "trained on", *(["measured on"] if held_out else []), box=box.SIMPLE_HEAD)
    reports = [train, *([held_out] if held_out else [])]

    def add(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    add("rows", [f"{r.rows:,}" for r in reports])
    add("tokens", [f"{r.tokens:,}" for r in reports])
    if train.trained is not None:
        add("of these trained", [f"{(r.trained or 0) / r.tokens:.1%}" for r in reports])
    for percent in train.percentiles:
        add(f"{percent} % of the rows have up to", [f"{r.percentiles[percent]:,} tokens" for r in reports])
    add("the longest has", [f"{r.longest:,} tokens" for r in reports])
    add(f"cut at max_length ({inputs.max_length:,})", [f"{r.cut:,}" for r in reports])
    add("dropped (no answer within max_length)", [f"{r.dropped:,}" for r in reports])
    add("tokens lost by both", [f"{r.lost:,}" for r in reports])
    if inputs.task.labels:
        counts, counted = count_labels(inputs.task.examples), count_labels(inputs.task.eval_examples)
        for label in inputs.task.labels:
            add(f"label {label}", [f"{counts[label]:,}", *([f"{counted[label]:,}"] if held_out else [])])
    console.print(table)
    used = inputs.task.examples.used
    for name, (count, of) in used.items() if len(used) > 1 else ():
        console.print(f"{name}: {count:,} of {of:,} rows")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        console.print(f"{note}.")


def _show_oddities(console: Console, inputs: DataInputs, rows: Tokenized, held_out: Tokenized | None) -> None:
    from halfbyte.data import odd_labels, odd_rows

    found: list[Oddity]
    if rows.facts is None and not inputs.task.labels:  # answers that are preferred or judged
        found = []
    elif inputs.task.labels:
        found = odd_labels(inputs.task.examples)
    else:
        found = odd_rows(rows, inputs.task.examples, inputs.max_length, held_out=held_out)
    for oddity in found:
        where = "; ".join(oddity.where)
        more = ", ..." if oddity.count > len(oddity.where) else ""
        console.print(f"odd: {oddity.count:,} rows {oddity.what}{f': {where}{more}' if where else ''}")
