"""`halfbyte quantize`: a model folder in, a 4-bit folder or archive out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from halfbyte.models import HalfbyteConfig

# What an architecture's name ends in -> the task it is loaded for; anything else is an encoder without a head.
TASK_OF = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}


# budget: each option of the command is a parameter, that is how typer reads them
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder, or a name on the hub.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, or one file: an archive NAME.nf4dq.")
    ],
    format: Annotated[str, typer.Option(help="Number format: nf4, fp4, e2m1, int4, int8.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    scale_bits: Annotated[str, typer.Option(help="Bits of a scale: 8, 6, 4, or 32 for float32.")] = "8",
    skip: Annotated[list[str] | None, typer.Option(help="Module to leave as it is; may repeat.")] = None,
    quantize_embeddings: Annotated[
        bool,
        typer.Option(
            "--quantize-embeddings/--keep-embeddings",
            help="Quantize the embeddings too, and with them an output layer that is tied to them.",
        ),
    ] = False,
    compress: Annotated[bool, typer.Option("--compress", help="Entropy-code an archive's codes and scales.")] = False,
) -> None:
    """Quantize a model and save it."""
    if scale_bits not in ("8", "6", "4", "32"):
        raise RequestError(f"--scale-bits {scale_bits} is not offered; choose one of: 8, 6, 4, 32.")
    from halfbyte import env
    from halfbyte.models import HalfbyteConfig, check_output_archive, check_output_folder, is_archive
    from halfbyte.train.memory import PeakMemory

    if Path(model).exists():
        env.go_offline()
    if compress and not is_archive(output):
        raise RequestError(f"--compress makes archives only; name a file that ends in .nf4dq instead of {output}.")
    check = check_output_archive if is_archive(output) else check_output_folder
    check(output)
    config = HalfbyteConfig(
        format=format,
        block_size=block_size,
        scale_bits=None if scale_bits == "32" else int(scale_bits),
        skip_modules=skip,
        quantize_embeddings=quantize_embeddings,
    )
    memory, start = PeakMemory(), time.perf_counter()
    report = _quantize(model, output, config, compress)
    seconds = time.perf_counter() - start
    before, after = _weight_bytes(Path(model)), _weight_bytes(output)
    typer.echo(str(report))
    shrunk = f"{before / 1e6:,.1f} MB -> " if before else ""
    rate = f" ({before / 1e6 / seconds:,.0f} MB/s)" if before else ""
    typer.echo(
        f"{shrunk}{after / 1e6:,.1f} MB in {seconds:.1f} s{rate}, peak memory {memory.host() / 1e6:,.0f} MB: {output}"
    )
    if compress:
        typer.echo(_compression(output))


def _quantize(model: str, output: Path, config: HalfbyteConfig, compress: bool) -> Any:
    from halfbyte.models import is_archive, open_checkpoint, quantize_to_archive, quantize_to_folder

    folder = Path(model)
    task = task_of(open_checkpoint(folder, verify=False).config) if folder.exists() else "causal-lm"
    if is_archive(output):
        return quantize_to_archive(model, output, config, task=task, compress=compress)
    return quantize_to_folder(model, output, config, task=task)


def task_of(config: dict[str, Any]) -> str:
    """The task that a model is loaded for, from its config.json."""
    architecture = next(iter(config.get("architectures") or []), "ForCausalLM")
    return next((task for ending, task in TASK_OF.items() if architecture.endswith(ending)), "encoder")


def _weight_bytes(path: Path) -> int:
    """Bytes of an archive, or of the safetensors files in a folder; 0 for a name on the hub."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0


def _compression(output: Path) -> str:
    """Bits before and after, and what they are of a 16-bit and of a 32-bit model."""
    from halfbyte.models import Archive, describe

    facts = describe(Archive(output))
    after = facts["bits_per_quantized_parameter"]
    before = facts.get("bits_per_quantized_parameter_uncompressed", after)
    return (
        f"compressed without loss: {before:.3f} -> {after:.3f} bits a quantized parameter, 1/{32 / after:.2f} of "
        f"float32 and 1/{16 / after:.2f} of float16 (an eighth is 4 and 2 bits; 2 bits need loss)"
    )
