"""A LoRA adapter as a GGUF file, to be put on the GGUF file of its base (llama.cpp's `--lora`).

llama.cpp adds `alpha / rank * B @ A` to a matrix, with one alpha for the file and the rank of each pair. peft may have
an alpha for each module, a rank for each, and divide by the rank's root (rsLoRA): the file's alpha is the one that most
pairs need, and the B of any other pair is multiplied by what is missing. What cannot be said so (DoRA, whole modules,
biases, an initialisation that changed the base) is refused by name.

The base has to be known: q and k of a Llama are reordered in its file, and with them the rows of their B.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models.gguf.architectures import HEAD, Architecture, Sizes, find_architecture, locate
from halfbyte.models.gguf.writing import Tensor, Written, check_type, package, type_for, write_gguf
from halfbyte.models.loading import load_config, resolve
from halfbyte.models.saving import check_output_file
from halfbyte.models.sources import check_model_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# An option of peft's -> the values under which an adapter is nothing but A and B.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "use_qalora": (None, False),
}
# Initialisations that take something off the base, which its GGUF file still has.
_CHANGES_BASE = ("pissa", "olora", "corda")
_KEY = re.compile(r"base_model\.model\.(.+?)\.lora_(embedding_)?([AB])(?:\.weight)?")


@dataclass
class _Pair:
    """A and B of one module, and what peft multiplies their product by."""

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def alpha(self) -> float:
        """The alpha that makes llama.cpp multiply by the same."""
        return self.scale * self.b.shape[1]


def export_adapter(
    adapter: str | Path, output: str | Path, base: str | Path | None = None, type: str = "f32"
) -> Written:
    """Write a LoRA adapter as a GGUF file.

    Args:
        adapter: a folder that peft saved.
        output: a new file.
        base: the model that it was trained on; None: the one that the adapter names.
        type: of the matrices, as for `export_gguf`.

    Raises:
        CheckpointError: the adapter or its base is missing or damaged, or they do not fit each other.
        RequestError: the adapter is more than A and B, or llama.cpp has no graph for its base. Nothing is written.
        OutputError: see `new_file`.
    """
    wanted, gguf = check_type(type), package()
    check_output_file(output)
    folder = Path(adapter)
    options = _options(folder)
    named = base or options.get("base_model_name_or_path")
    if not named:
        raise CheckpointError(
            f"adapter {folder} does not name its base, and q and k cannot be written without; give it"
        )
    model = resolve(named)
    architecture = find_architecture(check_model_folder(model), model)
    config = load_config(model)
    pairs = _pairs(folder, options)
    alpha = Counter(pair.alpha for pair in pairs).most_common(1)[0][0]
    tensors = [tensor for pair in pairs for tensor in _tensors(pair, architecture, config, wanted, alpha)]
    folded = sum(not math.isclose(pair.alpha, alpha) for pair in pairs)
    notes = [f"{folded} of {len(pairs)} pairs have an alpha or a rank of their own, which went into their B"]
    metadata = {
        "general.type": "adapter",
        "general.name": folder.resolve().name,
        "general.file_type": int(gguf.LlamaFileType.GUESSED),
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    return write_gguf(Path(output), architecture.name, metadata, tensors, notes if folded else [])


def _options(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it says more than A and B."""
    try:
        options: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise CheckpointError(f"{folder / CONFIG} holds a {type(options).__name__}, not an object")
    for option, plain in _PLAIN.items():
        if options.get(option) not in plain:
            raise RequestError(
                f"adapter {folder} has {option}: {json.dumps(options.get(option))}, which a GGUF adapter cannot say; "
                "merge it into its base and export the model"
            )
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise RequestError(
            f"adapter {folder} was initialised by {start!r}, which changed its base; merge it into that base and "
            "export the model"
        )
    return options


def _pairs(folder: Path, options: dict[str, Any]) -> list[_Pair]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open has no __iter__)
                if key.endswith(".base_layer.weight"):
                    continue  # peft's copy of a table that is adapted; the base has it
                found = _KEY.fullmatch(key)
                if found is None:
                    raise RequestError(f"{path} holds {key}, which a GGUF adapter has no place for")
                module, embedding, half = found.groups()
                tensor = file.get_tensor(key).to(torch.float32)
                # peft's A of an embedding is [rank, vocabulary], and llama.cpp looks up its rows.
                halves.setdefault(module, {})[half] = tensor.T if embedding and half == "A" else tensor
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from None
    pairs = []
    for module, both in sorted(halves.items()):
        if both.keys() != {"A", "B"}:
            raise CheckpointError(f"{path} has only one of A and B for {module}")
        pairs.append(_Pair(module, both["A"], both["B"], _scale(module, both["B"].shape[1], options)))
    if not pairs:
        raise CheckpointError(f"{path} holds no adapter weights")
    return pairs


def _scale(module: str, rank: int, options: dict[str, Any]) -> float:
    """What peft multiplies B @ A by; a pattern's key is a regular expression for the end of a name."""
    patterns = options.get("alpha_pattern") or {}
    match = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(options["lora_alpha"] if match is None else patterns[match])
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _tensors(pair: _Pair, architecture: Architecture, config: Any, wanted: str, alpha: float) -> list[Tensor]:
    """lora_a and lora_b of one module."""
    sizes, weight = Sizes.of(config), f"{pair.module}.weight"
    place = locate(weight, architecture)
    if place is None or (weight == HEAD and config.tie_word_embeddings):
        why = "a head that is tied to the embedding" if weight == HEAD else "it"
        raise RequestError(f"the adapter has a pair for {pair.module}, and llama.cpp's graph has no place for {why}")
    rows, columns = sizes.shape(place[1], config.vocab_size)
    a, b, embedding = pair.a, pair.b, place[0].startswith("token_embd")
    fits = (b.shape[0], a.shape[0]) == (columns, rows) if embedding else (b.shape[0], a.shape[1]) == (rows, columns)
    if not fits or b.shape[1] != (a.shape[1] if embedding else a.shape[0]):
        raise CheckpointError(
            f"the adapter's pair for {pair.module} is {tuple(b.shape)} and {tuple(a.shape)}, and its base has "
            f"{(rows, columns)}"
        )
    order = sizes.order(weight) if architecture.interleaved else None
    if order is not None:
        b = b[order]
    if not math.isclose(pair.alpha, alpha):
        b = b * (pair.alpha / alpha)
    return [
        Tensor(
            f"{place[0]}.lora_{half}",
            f"{pair.module}.lora_{half.upper()}",
            tuple(tensor.shape),
            type_for(tuple(tensor.shape), wanted),
            _once(tensor),
        )
        for half, tensor in (("a", a), ("b", b))
    ]


def _once(tensor: torch.Tensor) -> Any:
    return lambda: [tensor]
