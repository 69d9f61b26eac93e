"""A whole model as one GGUF file: a 16-bit folder, a 4-bit folder or an archive in, read one tensor at a time.

Everything that can be refused is refused before the file is made: the architecture, each tensor by its name and shape,
the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models.gguf.architectures import (
    EMBEDDING,
    HEAD,
    Architecture,
    Sizes,
    find_architecture,
    hyperparameters,
    is_computed,
    locate,
    required,
    rope_divisors,
    window_note,
)
from halfbyte.models.gguf.tokenizer import read_vocabulary
from halfbyte.models.gguf.writing import Tensor, Written, check_type, package, type_for, write_gguf
from halfbyte.models.loading import load_config, load_tokenizer, resolve
from halfbyte.models.saving import check_output_file
from halfbyte.models.sources import model_files, open_checkpoint
from halfbyte.models.weights import Weight, read_weights

# How llama.cpp counts versions of its block formats.
_QUANTIZATION_VERSION = 2


def export_gguf(source: str | Path, output: str | Path, type: str = "f16") -> Written:
    """Write a model as a GGUF file that llama.cpp runs.

    Args:
        source: a model folder, 16-bit or 4-bit, an archive, or a name on the hub.
        output: a new file.
        type: of the matrices: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0". Vectors are float32, and
            a matrix whose rows are not whole blocks is f16.

    Returns:
        What was written, and what the rounding lost.

    Raises:
        CheckpointError: the model is incomplete or damaged; the message names file and tensor.
        RequestError: llama.cpp has no graph, no place for a tensor, or no tokenizer that does the same; or the gguf
            package is not installed. Nothing is written.
        OutputError: see `new_file`.
    """
    wanted, gguf = check_type(type), package()
    check_output_file(output)
    folder = resolve(source)
    checkpoint = open_checkpoint(folder)
    architecture = find_architecture(checkpoint.config, folder)
    config = load_config(folder)
    metadata = {
        "general.type": "model",
        "general.name": Path(source).resolve().stem if Path(source).exists() else str(source),
        "general.file_type": int(gguf.LlamaFileType[_file_type(wanted)]),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **hyperparameters(architecture, config),
    }
    weights = read_weights(checkpoint)
    tensors = _plan(weights, architecture, config, wanted, folder)
    rows = weights[EMBEDDING].shape[0]
    vocabulary = read_vocabulary(load_tokenizer(folder), rows, config, _stops(folder))
    metadata |= {f"{architecture.name}.vocab_size": rows, **vocabulary.values}
    notes = [*vocabulary.notes, *_notes(weights, tensors, wanted)]
    window = window_note(config)
    return write_gguf(Path(output), architecture.name, metadata, tensors, [*notes, *([window] if window else [])])


def _file_type(wanted: str) -> str:
    from halfbyte.models.gguf.writing import TYPES

    return TYPES[wanted]


def _plan(
    weights: dict[str, Weight], architecture: Architecture, config: Any, wanted: str, folder: Path
) -> list[Tensor]:
    """Every tensor of the file, in llama.cpp's order: outside the layers first, then layer by layer."""
    sizes = Sizes.of(config)
    rows = weights[EMBEDDING].shape[0] if EMBEDDING in weights else 0
    missing = [name for name in required(architecture, sizes.layers) if name not in weights]
    if not config.tie_word_embeddings and HEAD not in weights:
        missing.append(HEAD)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]}")
    tensors = []
    divisors = rope_divisors(config)
    if divisors is not None:
        tensors.append(Tensor("rope_freqs.weight", "rope_freqs", tuple(divisors.shape), "f32", _constant(divisors)))
    for name, weight in weights.items():
        if is_computed(name) or (name == HEAD and config.tie_word_embeddings and _same(weight, weights[EMBEDDING])):
            continue
        place = locate(name, architecture)
        if place is None or (name.startswith("model.layers.") and int(name.split(".")[2]) >= sizes.layers):
            raise RequestError(f"tensor {name} has no place in llama.cpp's graph {architecture.name!r}")
        shape = sizes.shape(place[1], rows)
        if weight.shape != shape:
            raise CheckpointError(f"{folder} has {name} as {weight.shape}, and the config says {shape}")
        order = sizes.order(name) if architecture.interleaved else None
        offset = architecture.norm_offset if name.endswith("norm.weight") else 0.0
        pieces = _Pieces(weight, order, offset)
        tensors.append(Tensor(place[0], name, shape, type_for(shape, wanted), pieces))
    return sorted(tensors, key=_position)


class _Pieces:
    """A weight's values as the graph wants them, a few rows at a time."""

    def __init__(self, weight: Weight, order: torch.Tensor | None, offset: float) -> None:
        self.weight, self.order, self.offset = weight, order, offset

    def __call__(self) -> Iterable[torch.Tensor]:
        for piece in self.weight.pieces(self.order):
            yield piece + self.offset if self.offset else piece


def _constant(tensor: torch.Tensor) -> Any:
    return lambda: [tensor]


def _same(one: Weight, other: Weight) -> bool:
    """Whether a head that is said to be tied holds what the embedding holds."""
    if one.shape != other.shape:
        return False
    return all(torch.equal(left, right) for left, right in zip(one.pieces(), other.pieces(), strict=True))


def _position(tensor: Tensor) -> tuple[int, str]:
    block = tensor.name.split(".")
    return (int(block[1]), tensor.name) if block[0] == "blk" else (-1, tensor.name)


def _stops(folder: Path) -> list[int]:
    """The ids that generation_config.json ends an answer at."""
    from transformers import GenerationConfig

    with model_files(folder) as files:
        if not (Path(files) / "generation_config.json").is_file():
            return []
        stops = GenerationConfig.from_pretrained(files).eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


def _notes(weights: dict[str, Weight], tensors: list[Tensor], wanted: str) -> list[str]:
    packed = sorted({weight.stored for weight in weights.values() if weight.packed})
    notes = []
    if packed:
        count = sum(weight.packed for weight in weights.values())
        notes.append(
            f"{count} tensors were {', '.join(packed)}: they are decoded to float32 and rounded again, and what the "
            "first rounding lost does not come back"
        )
    kept = sum(tensor.type == "f16" for tensor in tensors) if wanted != "f16" else 0
    if kept:
        notes.append(f"{kept} matrices have rows that are not whole blocks of {wanted} and are f16")
    return notes
