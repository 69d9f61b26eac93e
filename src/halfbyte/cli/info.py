"""`halfbyte info`: what this machine has and runs, or what a folder holds."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from halfbyte.kernels import Choice

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "triton",
    "liger-kernel",
)
STATE_MARKER = ".quant_state."
ARCHIVE = ".nf4dq"
GGUF = ".gguf"


def info(
    folder: Annotated[
        Path | None, typer.Argument(help="Archive, or model, adapter or run directory.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter: a model, to see whether it is its base.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine runs and why, or what a folder or an archive holds."""
    facts = machine_info() if folder is None else folder_info(folder)
    if base is not None:
        facts["fits"] = _fits(folder, base)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if "tensors" in facts:
        facts = {key: value for key, value in facts.items() if key != "tensors"} | {"tensors": _table(facts["tensors"])}
    for key, value in facts.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, item in value.items():
                typer.echo(f"  {name:<28} {item}")
        else:
            typer.echo(f"{key:<30} {value}")


def machine_info() -> dict[str, Any]:
    """Versions, processor, memory, GPU, and which kernels and parts of a model run, with the reason."""
    import torch

    from halfbyte.device import this_machine
    from halfbyte.kernels.tuning import too_old

    machine = this_machine()
    gpus = ", ".join(f"{name} ({memory / 1e9:.0f} GB)" for name, memory in machine.gpus)
    for number in range(len(machine.gpus)):
        if why_not := too_old(torch.device("cuda", number)):
            gpus += f"; {why_not}: torch operations run there instead"
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "processor": f"{machine.processor}, {machine.capability}",
        "cores": machine.cores,
        "threads": torch.get_num_threads(),
        "memory": f"{machine.memory / 1e9:.1f} GB",
        "gpu": gpus or f"none ({machine.gpu_reason})",
    }
    return facts | {"kernels": _kernels(), "parts": _parts()}


def folder_info(folder: Path) -> dict[str, Any]:
    """What a folder or an archive holds, from its configs and the headers of its files; no weight is read.

    Raises:
        CheckpointError: it is missing or is neither a model nor an adapter.
    """
    if folder.suffix == ARCHIVE:
        return _archive_info(folder)
    if folder.suffix == GGUF:
        from halfbyte.models import read_config

        read_config(folder)  # says what halfbyte does with such a file
    if not folder.is_dir():
        raise CheckpointError(f"folder {folder} does not exist.")
    if (folder / "adapter_config.json").is_file():
        return _adapter_info(folder)
    if (folder / "config.json").is_file():
        return _model_info(folder)
    raise CheckpointError(f"folder {folder} is neither a model (config.json) nor an adapter (adapter_config.json).")


def _archive_info(path: Path) -> dict[str, Any]:
    from halfbyte.models import Archive, check_model_folder, describe

    archive = Archive(path)
    facts = describe(archive)
    if "adapter_config.json" in archive.directory.files:
        return facts | {"kind": "packed adapter"}
    config = check_model_folder(path)
    architecture = ", ".join(config.get("architectures") or [config.get("model_type", "?")])
    return {"kind": facts.pop("kind"), "architecture": architecture} | facts


def _table(tensors: dict[str, Any]) -> dict[str, str]:
    """One line for each tensor of an archive."""
    lines = {}
    for name, fact in tensors.items():
        if "same_as" in fact:
            lines[name] = f"same as {fact['same_as']}"
            continue
        size = "x".join(map(str, fact["shape"]))
        how = f", {fact['format']} block {fact['block_size']} scales {fact['scale_bits']}" if "format" in fact else ""
        lines[name] = f"{fact['dtype']} {size}{how}, {fact['bytes']:,} bytes"
    return lines


def _adapter_info(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    from halfbyte.models import read_base

    config = _json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} is missing or damaged: {error}") from None
    facts = {
        "kind": "adapter",
        "base": config.get("base_model_name_or_path"),
        "type": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": ", ".join(sorted(config.get("target_modules") or [])),
        "parameters": parameters,
    }
    stored = read_base(folder)
    if stored is not None:
        facts["base_sha256"] = stored["sha256"]
    if config.get("rank_pattern"):
        facts["rank_pattern"] = config["rank_pattern"]
    if (folder / "summary.json").is_file():
        summary = _json(folder / "summary.json")
        facts |= {key: summary.get(key) for key in ("steps", "final_loss", "before", "after", "bits_per_parameter")}
    return facts | {"matrices": _matrices(folder)}


def _matrices(folder: Path) -> dict[str, str]:
    """One line for each adapted matrix."""
    from halfbyte.models import describe_adapter

    return {
        name: f"rank {fact['rank']} (effective {fact['effective_rank']:.1f}), norm {fact['norm']:.4g}"
        for name, fact in describe_adapter(folder).items()
    }


def _fits(folder: Path | None, base: str) -> str:
    """Whether an adapter belongs to a base, in one sentence."""
    from halfbyte.models import base_hash, other_base, read_base

    if folder is None or not (folder / "adapter_config.json").is_file():
        raise RequestError("--base asks whether an adapter belongs to a base; name the adapter's folder first.")
    stored = read_base(folder)
    if stored is None:
        return "unknown: the adapter does not say which base it was trained on"
    if base_hash(base)["storage"] != stored["storage"]:
        return f"unknown: it was trained on {stored['base']} as {stored['storage']}, and {base} is stored otherwise"
    return other_base(folder, base) or f"yes: {base} is the base that it was trained on"


def _model_info(folder: Path) -> dict[str, Any]:
    """Parameters and bits, counted from the files: a packed weight has as many parameters as its state says.

    `bits_per_parameter` is all bytes of all tensors; `bits_per_quantized_parameter` is codes and scales of the packed
    ones, without the constant tables that the layout repeats beside each.
    """
    from halfbyte.models import open_checkpoint

    checkpoint = open_checkpoint(folder)
    shapes = {
        key.partition(STATE_MARKER)[0]: json.loads(bytes(checkpoint[key].read().tolist()))["shape"]
        for key in checkpoint
        if STATE_MARKER in key
    }
    beside = {weight: [key for key in checkpoint if key.startswith(weight + ".")] for weight in shapes}
    companions = {key for keys in beside.values() for key in keys}
    quantized = sum(math.prod(shape) for shape in shapes.values())
    packed = sum(
        checkpoint[key].nbytes
        for weight, keys in beside.items()
        for key in (weight, *keys)
        if key == weight or key.endswith("absmax")
    )
    plain = sum(math.prod(checkpoint[key].shape) for key in checkpoint if key not in companions and key not in shapes)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.values())
    facts = {
        "kind": "model",
        "architecture": ", ".join(checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "?")]),
        "parameters": plain + quantized,
        "quantized_share": round(quantized / (plain + quantized), 4),
        "bits_per_parameter": round(8 * nbytes / (plain + quantized), 4),
        "bytes": nbytes,
    }
    if quantized:
        facts["bits_per_quantized_parameter"] = round(8 * packed / quantized, 4)
    return facts


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    """Which implementation serves each op, why, and what would make it faster."""
    from halfbyte.kernels import chosen

    return _told(chosen())


def _parts() -> dict[str, str]:
    """Which implementation computes the parts of a model beside its packed weights, and takes the steps of decoding."""
    from halfbyte.infer.few_rows import chosen_decoders
    from halfbyte.nn.parts import chosen_parts

    return _told([*chosen_parts(), *chosen_decoders()])


def _told(choices: Iterable[Choice]) -> dict[str, str]:
    return {
        f"{choice.op} ({choice.device})": f"{choice.name}: {choice.reason}"
        + (f"; {choice.remedy}" if choice.remedy else "")
        for choice in choices
    }
