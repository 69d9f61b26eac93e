"""`halfbyte adapter`: combine and scale adapters, and store one in 4 bits for sharing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.errors import RequestError

OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]


# budget: each option of the command is a parameter, that is how typer reads them
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, two or more, of one base.")],
    output: OUTPUT,
    weights: Annotated[str | None, typer.Option(help="One for each, with commas: 0.7,0.3. All 1 if not given.")] = None,
    combination_type: Annotated[
        str, typer.Option(help="peft's: cat (the exact sum), svd, linear, ties, ties_svd, dare_linear, dare_ties, ...")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of svd and *_svd.")] = None,
    density: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of values kept by ties, dare_* and magnitude_prune.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of DARE's choice.")] = 0,
) -> None:
    """Combine adapters into one."""
    from halfbyte import env
    from halfbyte.models import combine_adapters

    env.go_offline()
    distance = combine_adapters(
        adapters,
        output,
        weights=_numbers(weights),
        combination_type=combination_type,
        rank=rank,
        density=density,
        seed=seed,
    )
    typer.echo(f"combined {len(adapters)} adapters ({combination_type}): {output}")
    typer.echo(f"relative distance from the weighted sum of their changes: {distance:.3g}")


def scale(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: OUTPUT,
    factor: Annotated[float, typer.Option(help="1 leaves it, 0.5 halves its change, -1 takes it back.")],
) -> None:
    """Scale what an adapter changes."""
    from halfbyte.models import scale_adapter

    scale_adapter(adapter, output, factor)
    typer.echo(f"scaled by {factor}: {output}")


# budget: each option of the command is a parameter, that is how typer reads them
def pack(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, NAME.nf4dq.", show_default=False)],
    format: Annotated[str, typer.Option(help="Number format: nf4, fp4, e2m1, int4, int8.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    scale_bits: Annotated[str, typer.Option(help="Bits of a scale: 8, 6, 4, or 32.")] = "32",
    base: Annotated[str | None, typer.Option(help="Its base, to measure what the rounding does to answers.")] = None,
) -> None:
    """Store an adapter in 4 bits, in one file, and say what that loses."""
    if scale_bits not in ("8", "6", "4", "32"):
        raise RequestError(f"--scale-bits {scale_bits} is not offered; choose one of: 8, 6, 4, 32.")
    from halfbyte.formats import QuantSpec
    from halfbyte.models import pack_adapter

    spec = QuantSpec(format, block_size, None if scale_bits == "32" else int(scale_bits))
    errors = pack_adapter(adapter, output, spec)
    before = (adapter / "adapter_model.safetensors").stat().st_size
    typer.echo(f"{before / 1e3:,.1f} kB of weights -> {output.stat().st_size / 1e3:,.1f} kB with all files: {output}")
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    typer.echo(f"relative error of a matrix: {mean:.4f} on average, at most {errors[worst]:.4f} ({worst})")
    if base is not None:
        _compare(base, adapter, output)


def unpack(
    archive: Annotated[Path, typer.Argument(help="What `halfbyte adapter pack` made.")],
    output: OUTPUT,
) -> None:
    """Write a packed adapter as an ordinary peft folder."""
    from halfbyte.models import unpack_adapter

    unpack_adapter(archive, output)
    typer.echo(f"unpacked: {output}")


def _compare(base: str, adapter: Path, packed: Path) -> None:
    """The KL of the packed adapter's logits from the original's, on the same base."""
    from halfbyte.cli.answering import load_adapted
    from halfbyte.cli.merge import adapted
    from halfbyte.evaluate import parity
    from halfbyte.evaluate.parity import PROMPTS
    from halfbyte.models import unpack_adapter

    wanted, without = adapted(base, adapter, PROMPTS)
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as name:
        folder = Path(name) / "adapter"
        unpack_adapter(packed, folder)
        found = parity(wanted, load_adapted(base, folder)[0])
    typer.echo(
        f"logits: KL {found.kl:.3g} nats a token, the same token at {found.agreement:.1%}; without any adapter: KL "
        f"{without.kl:.3g}, {without.agreement:.1%}"
    )


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--weights {text} are not numbers with commas between them; 0.7,0.3 for example.") from None
