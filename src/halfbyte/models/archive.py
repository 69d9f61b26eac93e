"""Models into archives: one that is in memory, or one that streams from a folder and is never held.

An archive carries what a folder carries beside its weights: config.json (with our `quantization_config`),
generation_config.json and every tokenizer file, so that it can be moved as one file. Its tensors have the names of the
model's parameters; names that the model ties are recorded and stored once.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from halfbyte.errors import RequestError
from halfbyte.formats import QuantSpec
from halfbyte.models import saving
from halfbyte.models.archive_reader import is_archive
from halfbyte.models.archive_writer import ArchiveWriter, new_archive
from halfbyte.models.checkpoint import INDEX
from halfbyte.models.config import HalfbyteConfig
from halfbyte.models.loading import load_model, resolve
from halfbyte.models.quantizer import check_finite, into_sink
from halfbyte.models.quantizing import QuantizingStream
from halfbyte.models.sources import model_files, open_checkpoint
from halfbyte.nn import QuantizationReport, make_plan, output_layers
from halfbyte.tensor import QuantizedTensor

# What a tokenizer, a chat template, a generation config and a licence are stored in. Weights and code are not.
CARRIED = (".json", ".jinja", ".model", ".tiktoken", ".txt")


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
    request = {"quantization": quantization.own_dict(), "task": task, "source": folder}
    with model_files(folder) as files, new_archive(output, request, compress=compress) as archive:
        model = quantize_into(archive, folder, quantization, task)
        _add_files(archive, model, None, Path(files))
    report: QuantizationReport = model.halfbyte_report
    return report


def quantize_into(archive: ArchiveWriter, folder: Path, quantization: HalfbyteConfig, task: str) -> Any:
    """Write every tensor of a model folder into an archive, quantized, as it streams in.

    Args:
        archive: to write into; what it has already is left as it is.
        folder: a model folder or an archive.
        quantization: how.
        task: as for `load_model`.

    Returns:
        The model, without its bytes where they were quantized here.

    Raises:
        CheckpointError, FormatError: see `load_model`.
    """
    with ExitStack() as writing:
        if open_checkpoint(folder, verify=False).quant_method is None:
            writing.enter_context(into_sink(writing.enter_context(QuantizingStream(archive))))
        model = load_model(folder, quantization=quantization, task=task)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta:
            check_finite(name, tensor)
    _add_rest(archive, model)
    return model


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
    for name, data in small_files(model, saved_config(model), tokenizer, source):
        archive.add_file(name, data)


def small_files(model: Any, config: Any, tokenizer: Any, source: Path | None) -> Iterator[tuple[str, bytes]]:
    """What stands beside a model's weights: configs, tokenizer, licence.

    Args:
        model: for its generation config.
        config: becomes config.json.
        tokenizer: is saved, if given.
        source: a folder with other such files, or None.

    Yields:
        File name and content.
    """
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as name:
        folder = Path(name)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {file.name: file for file in source.iterdir()} if source is not None else {}
        files |= {file.name: file for file in folder.iterdir()}
        for name, file in sorted(files.items()):
            if file.is_file() and file.suffix in CARRIED and name != INDEX and not name.startswith("."):
                yield name, file.read_bytes()


def saved_config(model: Any) -> Any:
    """A copy of the model's config as an archive's config.json holds it: with our own description."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    first = next((p for p in model.parameters() if isinstance(p, QuantizedTensor)), None)
    if first is not None:
        known = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        config.quantization_config = (known or _config_of(model, first.spec)).own_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _config_of(model: Any, spec: QuantSpec) -> HalfbyteConfig:
    """How a model was quantized in memory: what it kept is named, or a loader would expect it packed."""
    plan = make_plan(model, heads=output_layers(model))
    kept = [
        name.rpartition(".")[0] for name in plan.chosen if not isinstance(model.get_parameter(name), QuantizedTensor)
    ]
    return HalfbyteConfig(**vars(spec), skip_modules=kept)
