"""`halfbyte export`: a model or an adapter for other programs: GGUF, dense safetensors, bitsandbytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.quantize import task_of
from halfbyte.errors import RequestError, nearest

if TYPE_CHECKING:
    from halfbyte.models.gguf import Written

TARGETS = ("gguf", "safetensors", "bitsandbytes")
DTYPES = ("bfloat16", "float16", "float32")
ADAPTER_CONFIG = "adapter_config.json"


def export(
    model: Annotated[
        str,
        typer.Argument(help="Model folder, archive, hub name, or adapter folder.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file or folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="gguf, safetensors (dense) or bitsandbytes (4-bit); gguf where the output ends in .gguf."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(help="Of GGUF matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0  [f16; adapters: f32]"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of safetensors: bfloat16, float16, float32  [the model's own]")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter of MODEL to write as a GGUF adapter, without the model.")
    ] = None,
) -> None:
    """Write a model, or a LoRA adapter, for other programs."""
    to = _target(to, output)
    if type is not None and to != "gguf":
        raise RequestError(f"--type is for GGUF; the output is {to}.")
    if dtype is not None and (to != "safetensors" or dtype not in DTYPES):
        raise RequestError(f"--dtype is one of {', '.join(DTYPES)}, for --to safetensors.")
    base: str | None = model
    if (Path(model) / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise RequestError(f"{model} is an adapter itself; leave --adapter out, or give its base as MODEL.")
        adapter, base = Path(model), None
    if adapter is not None and to != "gguf":
        raise RequestError(f"an adapter by itself can be written as GGUF; for {to}, merge it into its base first.")
    start = time.perf_counter()
    if to == "gguf":
        _gguf(model, base, adapter, output, type)
    else:
        _folder(model, output, to, dtype)
    typer.echo(f"{_nbytes(output) / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s: {output}")


def _target(to: str | None, output: Path) -> str:
    if to is None and output.suffix == ".gguf":
        return "gguf"
    if to is None:
        raise RequestError(f"name what {output} is to be: --to {', --to '.join(TARGETS)}.")
    if to not in TARGETS:
        raise RequestError(f"--to {to} is not offered; {nearest(to, TARGETS)}")
    if (to == "gguf") != (output.suffix == ".gguf"):
        raise RequestError(
            f"--to {to} writes {'a file that ends in .gguf' if to == 'gguf' else 'a folder'}, not {output}."
        )
    return to


def _gguf(model: str, base: str | None, adapter: Path | None, output: Path, type: str | None) -> None:
    from halfbyte.models.gguf import export_adapter, export_gguf

    written = (
        export_adapter(adapter, output, base, type or "f32") if adapter else export_gguf(model, output, type or "f16")
    )
    _tell(written)


def _tell(written: Written) -> None:
    for name, count in written.types.items():
        loss = written.loss[name]
        lost = f"rounding error {loss:.2g} of the values (rms)" if loss else "exact"
        typer.echo(f"{count} tensors as {name}: {lost}")
    for note in written.notes:
        typer.echo(f"note: {note}")


def _folder(model: str, output: Path, to: str, dtype: str | None) -> None:
    import torch

    from halfbyte import env
    from halfbyte.models import check_model_folder
    from halfbyte.models.export import export_bitsandbytes, export_safetensors

    local = Path(model).exists()
    if local:
        env.go_offline()
    task = task_of(check_model_folder(model)) if local else "causal-lm"
    if to == "bitsandbytes":
        typer.echo(str(export_bitsandbytes(model, output, task=task)))
    else:
        written = export_safetensors(model, output, None if dtype is None else getattr(torch, dtype), task=task)
        typer.echo(f"dense, {str(written).removeprefix('torch.')}")


def _nbytes(output: Path) -> int:
    files = output.rglob("*") if output.is_dir() else [output]
    return sum(file.stat().st_size for file in files if file.is_file())
