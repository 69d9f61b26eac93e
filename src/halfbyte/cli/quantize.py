"""`halfbyte quantize`: a model folder in, a 4-bit folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.errors import RequestError


def quantize(
    model: Annotated[str, typer.Argument(help="Model folder, or a name on the hub.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist, or be empty.")],
    format: Annotated[str, typer.Option(help="Number format: nf4, fp4, e2m1, int4, int8.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    scale_bits: Annotated[str, typer.Option(help="Bits of a scale: 8, 6, 4, or none for float32.")] = "8",
    skip: Annotated[list[str] | None, typer.Option(help="Module to leave as it is; may repeat.")] = None,
    quantize_embeddings: Annotated[bool, typer.Option(help="Quantize the embeddings too.")] = False,
) -> None:
    """Quantize a model and save it."""
    if scale_bits not in ("8", "6", "4", "none"):
        raise RequestError(f"--scale-bits {scale_bits} is not offered; choose one of: 8, 6, 4, none.")
    from halfbyte import env
    from halfbyte.models import HalfbyteConfig, check_output_folder, load_model, load_tokenizer, save_model

    if Path(model).exists():
        env.go_offline()
    check_output_folder(output)
    config = HalfbyteConfig(
        format=format,
        block_size=block_size,
        scale_bits=None if scale_bits == "none" else int(scale_bits),
        skip_modules=skip,
        quantize_embeddings=quantize_embeddings,
    )
    start = time.perf_counter()
    quantized = load_model(model, quantization=config)
    save_model(quantized, output, load_tokenizer(model))
    report = quantized.halfbyte_report
    before, after = weight_bytes(Path(model)), weight_bytes(output)
    typer.echo(str(report))
    shrunk = f"{before / 1e6:,.1f} MB -> " if before else ""
    typer.echo(f"{shrunk}{after / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s: {output}")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a folder; 0 where there are none, as for a name on the hub."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
