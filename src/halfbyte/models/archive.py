"""Models into archives: one that is in memory, or one that streams from a folder and is never held.

An archive carries what a folder carries beside its weights: config.json (with our `quantization_config`),
generation_config.json and every tokenizer file, so that it can be moved as one file. Its tensors have the names of the
model's parameters; names that the model ties are recorded and stored once.
"""

from __future__ import annotations

import copy
import ctypes
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.errors import RequestError
from halfbyte.models import saving
from halfbyte.models.archive_reader import is_archive
from halfbyte.models.archive_writer import ArchiveWriter, new_archive
from halfbyte.models.checkpoint import INDEX
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.loading import load_model, resolve
from halfbyte.models.quantizer import Sink, into_sink
from halfbyte.models.sources import model_files, open_checkpoint
from halfbyte.nn import QuantizationReport
from halfbyte.tensor import QuantizedTensor

# What a tokenizer, a chat template, a generation config and a licence are stored in. Weights and code are not.
CARRIED = (".json", ".jinja", ".model", ".tiktoken", ".txt")

# Bytes of tensors between two times that freed memory is given back.
_TRIM_EVERY = 1 << 24


def save_model(
    model: Any, path: str | Path, tokenizer: Any = None, *, max_shard_size: str = "5GB", compress: bool = False
) -> Path:
    """Write a model (and its tokenizer) as a folder of safetensors shards and configs, or as one archive.

    Args:
        model: a transformers model, quantized or not.
        path: a folder that does not exist or is empty, or a file that ends in `.nf4dq`.
        tokenizer: saved with it, if given.
        max_shard_size: of a folder, in transformers' notation.
        compress: entropy-code an archive's codes and scales.

    Returns:
        The path.

    Raises:
        OutputError: it cannot be written there, or the disk is full; nothing is left behind.
        RequestError: a compressed folder, or an archive of a model that has adapters on it.
    """
    if not is_archive(path):
        if compress:
            raise RequestError(f"only an archive can be compressed; name a file that ends in .nf4dq instead of {path}")
        return saving.save_model(model, path, tokenizer, max_shard_size=max_shard_size)
    if hasattr(model, "peft_config"):
        raise RequestError("an archive holds a base model; save the adapter by itself, or merge it first")
    with new_archive(path, {"model": str(id(model))}, compress=compress) as archive:
        _add_rest(archive, model)
        _add_files(archive, model, tokenizer)
    return Path(path)


def quantize_to_archive(
    source: str | Path,
    output: str | Path,
    quantization: HalfbyteConfig,
    *,
    task: str = "causal-lm",
    compress: bool = False,
) -> QuantizationReport:
    """Quantize a model folder into an archive, one tensor at a time: the model is never in memory.

    A run that was killed is continued by the same call; what it had finished is checked and kept.

    Args:
        source: a model folder or a name on the hub. One that is 4-bit already, in the encoding that is asked for, is
            copied.
        output: a file that ends in `.nf4dq`.
        quantization: how.
        task: as for `load_model`.
        compress: entropy-code codes and scales.

    Returns:
        What was quantized.

    Raises:
        CheckpointError, FormatError: see `load_model`.
        OutputError: see `new_archive`.
    """
    folder = resolve(source)
    streamed = open_checkpoint(folder, verify=False).quant_method is None
    request = {"quantization": quantization.own_dict(), "task": task, "source": source_state(folder)}
    with model_files(folder) as files, new_archive(output, request, compress=compress) as archive:
        with into_sink(_taker(archive)) if streamed else nullcontext():
            model = load_model(folder, quantization=quantization, task=task)
        _add_rest(archive, model)
        _add_files(archive, model, None, Path(files))
    report: QuantizationReport = model.halfbyte_report
    return report


def source_state(source: Path) -> list[list[Any]]:
    """What tells one source from another without reading it: its files' names, sizes and times."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _taker(archive: ArchiveWriter) -> Sink:
    """Writes each parameter as it is made and gives back one without memory."""
    since_trim = 0

    def take(model: nn.Module, name: str, make: Callable[[], torch.Tensor]) -> nn.Parameter:
        nonlocal since_trim
        if archive.has(name):
            return nn.Parameter(archive.placeholder(name), requires_grad=False)
        made = make().detach()
        # Some checkpoints hold both copies of a tied head; without their bytes transformers cannot see that.
        archive.add(name, made, _partners(model, name))
        placeholder = made.to("meta")
        since_trim += made.numel() * made.element_size()
        del made
        if since_trim > _TRIM_EVERY:
            trim()
            since_trim = 0
        return nn.Parameter(placeholder, requires_grad=False)

    return take


def trim() -> None:
    """Let the C library give freed memory back: glibc keeps up to 32 MB of each freed tensor's size for later.

    Without, quantizing a 435 M Llama peaked at 166 MB over the idle process; the largest tensor has 33.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _partners(model: Any, name: str) -> list[str]:
    """The names that the model's config ties to `name`."""
    tied: dict[str, str] = model.all_tied_weights_keys
    pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
    return [other for one, other in pairs if one == name]


def _add_rest(archive: ArchiveWriter, model: Any) -> None:
    """Every tensor of the model that the archive does not have yet."""
    state = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored: dict[int, str] = {}
    # The names that others are tied to come first, so that they are the ones that hold the bytes.
    for name in sorted(state, key=lambda name: (not archive.has(name), name in tied)):
        tensor = state[name]
        if id(tensor) in stored:
            archive.tie(name, stored[id(tensor)])
        else:
            archive.add(name, tensor.detach())
            stored[id(tensor)] = name


def _add_files(archive: ArchiveWriter, model: Any, tokenizer: Any, source: Path | None = None) -> None:
    """config.json and generation_config.json from the model, everything else from the tokenizer or the folder."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as name:
        folder = Path(name)
        _archive_config(model).save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {file.name: file for file in source.iterdir()} if source is not None else {}
        files |= {file.name: file for file in folder.iterdir()}
        for name, file in sorted(files.items()):
            if file.is_file() and file.suffix in CARRIED and name != INDEX and not name.startswith("."):
                archive.add_file(name, file.read_bytes())


def _archive_config(model: Any) -> Any:
    """The model's config as config.json is to hold it: our own description, whatever a folder would say."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    first = next((p for p in model.parameters() if isinstance(p, QuantizedTensor)), None)
    if first is not None:
        known = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        config.quantization_config = (known or HalfbyteConfig(**vars(first.spec))).own_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
