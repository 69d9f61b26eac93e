"""`halfbyte merge`: an adapter into its base, what rounding left of it, and whether the result says the same."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import DataError, RequestError, nearest

if TYPE_CHECKING:
    from halfbyte.evaluate import Parity, Reference
    from halfbyte.models import Output, Source

DTYPES = ("bfloat16", "float16", "float32")


# budget: each option of the command is a parameter, that is how typer reads them
def merge(
    base: Annotated[str, typer.Argument(help="The adapter's base: model folder, archive, or a name on the hub.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder or run directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, or a 4-bit archive NAME.nf4dq.")],
    onto: Annotated[
        str | None, typer.Option(help="Merge onto this model's weights, not onto those that the adapter was fitted to.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the base's if not given.")] = None,
    format: Annotated[str | None, typer.Option(help="Write 4-bit weights: nf4, fp4, e2m1, int4 (or int8).")] = None,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale, with --format.")] = 64,
    scale_bits: Annotated[str, typer.Option(help="Bits of a scale, with --format: 8, 6, 4, or 32.")] = "8",
    min_surviving_share: Annotated[
        float, typer.Option(help="Refuse a merge that keeps less of the adapter's change than this.")
    ] = 0.5,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line, for the parity check.")] = None,
    parity: Annotated[bool, typer.Option("--parity/--no-parity", help="Compare with the adapter on its base.")] = True,
) -> None:
    """Merge an adapter into its base, and check the result."""
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"--dtype {dtype} is not offered; {nearest(dtype, DTYPES)}")
    if scale_bits not in ("8", "6", "4", "32"):
        raise RequestError(f"--scale-bits {scale_bits} is not offered; choose one of: 8, 6, 4, 32.")
    asked = _prompts(prompts)
    import torch

    from halfbyte import env
    from halfbyte.models import HalfbyteConfig, Output, Source, is_archive, merge_adapter, other_base

    if Path(base).exists():
        env.go_offline()
    format = format or ("nf4" if is_archive(output) else None)
    bits = None if scale_bits == "32" else int(scale_bits)
    target = Output(
        output,
        None if dtype is None else getattr(torch, dtype),
        None if format is None else HalfbyteConfig(format=format, block_size=block_size, scale_bits=bits),
        min_surviving_share,
    )
    if other := other_base(adapter, base):
        raise RequestError(f"{other}; name its own base (--onto merges it onto another one)")
    source = fitted(base, adapter) if onto is None else Source(onto)
    report = merge_adapter(source, adapter, target)
    _tell(report, target, source)
    if not parity:
        return
    if report["task"] != "causal-lm":
        typer.echo(f"no parity check: it compares what language models write, and this is one of {report['task']}")
        return
    measured, stored = measure(base, adapter, output, asked), parity_file(output)
    _replace(stored, json.dumps(report | {"parity": measured}, indent=2) + "\n")
    _tell_parity(measured, onto, stored)


def fitted(base: str, adapter: Path) -> Source:
    """The weights that an adapter was fitted to: the base, quantized as the run's recipe says, if there is one.

    Raises:
        RequestError: the run has no adapter.
    """
    import torch

    from halfbyte.models import HalfbyteConfig, Source, check_model_folder

    file = adapter / "recipe.yaml"
    if not file.is_file():
        if Path(base).exists() and not check_model_folder(base).get("quantization_config"):
            typer.echo(
                f"{adapter} does not say what it was trained on; merging onto {base} as it is stored. If it was "
                "trained on 4-bit weights, run `halfbyte quantize` first and name the result as BASE.",
                err=True,
            )
        return Source(base)
    from halfbyte.train.recipe import load_recipe

    recipe = load_recipe(file, [f"model_name_or_path={base}"])
    if recipe.method == "full":
        raise RequestError(f"{adapter} is a whole model (method full); there is nothing to merge")
    compute = getattr(torch, recipe.compute_dtype)
    if recipe.method != "qlora":
        return Source(base, None, compute)
    whole = json.loads((adapter / "summary.json").read_text(encoding="utf-8")).get("trained_whole") or None
    quantization = HalfbyteConfig(recipe.format, recipe.block_size, recipe.scale_bits, compute, whole)
    return Source(base, quantization, compute)


def measure(base: str, adapter: Path, output: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """The parity of a merge with the adapter on its base, and the yardstick: of that base without it."""
    from halfbyte.evaluate import parity
    from halfbyte.models import load_model

    wanted, without = adapted(base, adapter, prompts)
    merged = parity(wanted, load_model(output))
    return {"merged": merged.as_dict(), "base_without_adapter": without.as_dict(), "prompts": list(prompts)}


def adapted(base: str, adapter: Path, prompts: Sequence[str]) -> tuple[Reference, Parity]:
    """What the adapter on its base says to prompts, and the parity of the base without it."""
    from halfbyte.cli.answering import load_adapted
    from halfbyte.evaluate import parity, reference

    model, tokenizer = load_adapted(base, adapter)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    wanted = reference(model, rows)
    with model.disable_adapter():
        return wanted, parity(wanted, model)


def parity_file(output: Path) -> Path:
    """Where the report with the parity lies: in a folder, or beside an archive."""
    return output.with_suffix(".merge.json") if output.is_file() else output / "merge.json"


def _prompts(file: Path | None) -> Sequence[str]:
    if file is None:
        from halfbyte.evaluate.parity import PROMPTS

        return PROMPTS
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if not prompts:
        raise DataError(f"{file} holds no prompt; write one a line")
    return prompts


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def _tell(report: dict[str, Any], output: Output, source: Source) -> None:
    total = report["total"]
    how = "decoded from " + source.quantization.spec.format if source.quantization else "as stored"
    typer.echo(
        f"merged {len(report['layers'])} matrices onto {source.path} ({how}): {total['surviving_share']:.1%} of the "
        f"adapter's change survives {report['dtype'] if output.quantization is None else output.quantization.spec}, "
        f"with noise of {total['noise']:.2f} times its size: {output.path}"
    )
    for name in report["untied"]:
        typer.echo(f"{name} is no longer tied: the adapter made it differ")


def _tell_parity(measured: dict[str, Any], onto: str | None, file: Path) -> None:
    merged, without = measured["merged"], measured["base_without_adapter"]
    typer.echo(
        f"against the adapter on its base: KL {merged['kl']:.3g} nats a token (at most {merged['largest_kl']:.3g}, "
        f"{merged['positions']} positions), the same token at {merged['greedy_agreement']:.1%}; the base without the "
        f"adapter: KL {without['kl']:.3g}, {without['greedy_agreement']:.1%}: {file}"
    )
    if onto is not None:
        typer.echo(f"the KL is what merging onto {onto} costs: the adapter was fitted to other weights")
    if merged["kl"] >= without["kl"] > 0:
        typer.echo("the merge is no nearer to the adapter than the base without it: keep the adapter apart", err=True)
