"""Adapters by themselves, without their base: what they hold, scaled, combined, and stored in 4 bits.

peft combines adapters that are on a model. Their shapes say all that it needs of one: `_stand_in` builds the modules
that an adapter was made for out of its own keys, with weights that have a shape and no bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.formats import QuantSpec
from halfbyte.models.adapter_overlay import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from halfbyte.models.archive_reader import Archive
from halfbyte.models.archive_writer import new_archive
from halfbyte.models.saving import new_folder
from halfbyte.tensor import QuantizedTensor, quantize

# peft's names, of those that leave plain LoRA.
COMBINATIONS = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
_PREFIX = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class LoraPair:
    """One adapted matrix: `scaling * up @ down`.

    Attributes:
        down: A, float32 [rank, in].
        up: B, float32 [out, rank].
        scaling: alpha / rank, or alpha / sqrt(rank).
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.down.shape[0])

    def singular_values(self) -> torch.Tensor:
        """Of the delta, float64 [rank], from the factors: the delta itself is never made."""
        _, up = torch.linalg.qr(self.up.double())
        _, down = torch.linalg.qr(self.down.double().T)
        values: torch.Tensor = torch.linalg.svdvals(up @ down.T) * abs(self.scaling)
        return values

    def effective_rank(self) -> float:
        """exp of the entropy of the singular values (Roy and Vetterli 2007): how many of the ranks are used."""
        values = self.singular_values()
        if not values.sum() > 0:
            return 0.0
        share = values / values.sum()
        return float(torch.special.entr(share).sum().exp())


def lora_pairs(folder: Path) -> dict[str, LoraPair]:
    """The matrices of an adapter, by the name of the module that they are for.

    Raises:
        CheckpointError: the folder is damaged, or a matrix lacks its partner.
    """
    config, tensors = read_adapter_config(folder), _weights(folder)
    pairs = {}
    for key, down in tensors.items():
        for ending, partner in _PAIRS.items():
            if key.endswith(ending):
                up = tensors.get(key.removesuffix(ending) + partner)
                if up is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
                    raise CheckpointError(f"adapter {folder}: {key} has no partner of its rank")
                name = key.removesuffix(ending).removeprefix(_PREFIX)
                pairs[name] = LoraPair(down.float(), up.float(), _scaling(config, name, down.shape[0]))
    return pairs


def describe_adapter(folder: Path) -> dict[str, dict[str, float]]:
    """Module name -> rank, norm of its delta, effective rank; of experts the mean of the last.

    Experts beside a `rank_pattern` are left out: which of their matrices has which rank is not in the files.

    Raises:
        CheckpointError: see `lora_pairs`.
    """
    config, described = read_adapter_config(folder), {}
    for name, whole in lora_pairs(folder).items():
        pairs = _by_expert(whole, config)
        if not pairs:
            continue
        described[name] = {
            "rank": pairs[0].rank,
            "norm": float(torch.stack([pair.singular_values().norm() for pair in pairs]).norm()),
            "effective_rank": sum(pair.effective_rank() for pair in pairs) / len(pairs),
        }
    return described


def _by_expert(whole: LoraPair, config: dict[str, Any]) -> list[LoraPair]:
    """Each expert's own, of a parameter of several: peft keeps A by expert, then rank, and B by rank, then expert."""
    rank, patterns = int(config["r"]), config.get("rank_pattern") or {}
    if not config.get("target_parameters") or whole.rank in {rank, *patterns.values()}:
        return [whole]
    if patterns:
        return []
    experts = whole.rank // rank
    scaling = whole.scaling * (experts**0.5 if config.get("use_rslora") else experts)
    down, up = whole.down.view(experts, rank, -1), whole.up.view(-1, rank, experts)
    return [LoraPair(down[expert], up[:, :, expert], scaling) for expert in range(experts)]


def scale_adapter(folder: Path, output: Path, factor: float) -> None:
    """Write an adapter whose change is `factor` times another's: alpha is scaled and no weight is touched.

    Raises:
        RequestError: it is not LoRA, or is DoRA, whose change is not proportional to anything.
        OutputError: see `new_folder`.
    """
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise RequestError(
            f"adapter {folder} is {'DoRA' if config.get('use_dora') else config.get('peft_type')}; "
            "only plain LoRA can be scaled"
        )
    whole = [key for key in _weights(folder) if not _is_lora(key)]
    if whole:
        raise RequestError(f"adapter {folder} holds {whole[0]} as a whole, which a factor cannot scale")
    config["lora_alpha"] = config["lora_alpha"] * factor
    config["alpha_pattern"] = {name: alpha * factor for name, alpha in (config.get("alpha_pattern") or {}).items()}
    with new_folder(output) as aside:
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        (aside / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def combine_adapters(
    folders: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    combination_type: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> float:
    """Combine adapters of one base into one, by peft's `add_weighted_adapter`.

    Args:
        folders: peft folders with plain LoRA in them.
        output: a new folder.
        weights: one for each; None: all 1.
        combination_type: "cat" (the exact weighted sum, its rank the sum of the ranks), "svd" (the best of rank
            `rank`), "linear" (factors are added: fast and rough), or TIES, DARE and pruning by peft's names.
        rank: of the SVD; None: the largest of the adapters'.
        density: share of the values that TIES, DARE and pruning keep.
        seed: of DARE's choice.

    Returns:
        The relative distance of the result from the weighted sum, over all matrices.

    Raises:
        RequestError: the adapters cannot be combined this way.
        CheckpointError: one is damaged, or they are of different bases.
        OutputError: see `new_folder`.
    """
    scales = [1.0] * len(folders) if weights is None else list(weights)
    pairs = _combinable(folders, scales, combination_type, density)
    model = _on_stand_in(folders, pairs)
    torch.manual_seed(seed)
    names = [f"adapter{index}" for index in range(len(folders))]
    try:
        model.add_weighted_adapter(
            names, scales, "combined", combination_type=combination_type, svd_rank=rank, density=density
        )
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"peft cannot combine them as {combination_type}: {error}") from None
    config = model.peft_config["combined"]
    # peft makes matrices for a scaling of 1 and copies the first adapter's rsLoRA, which would scale them again.
    config.use_rslora, config.inference_mode = False, True
    first = read_adapter_config(folders[0])  # what the stand-in had no use for
    config.task_type, config.fan_in_fan_out = first.get("task_type"), bool(first.get("fan_in_fan_out"))
    with new_folder(output) as aside:
        for file in folders[0].iterdir():
            if file.is_file() and file.name not in (
                ADAPTER_WEIGHTS,
                "README.md",
                "recipe.yaml",
                "summary.json",
                "metrics.jsonl",
            ):
                shutil.copyfile(file, aside / file.name)
        model.save_pretrained(aside, selected_adapters=["combined"], save_embedding_layers=False)
        for file in (aside / "combined").iterdir():
            file.replace(aside / file.name)
        (aside / "combined").rmdir()
        (aside / "README.md").unlink(missing_ok=True)
        saved = read_adapter_config(aside)
        saved["auto_mapping"] = first.get("auto_mapping")  # peft writes the stand-in's class
        (aside / ADAPTER_CONFIG).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
        return _distance(lora_pairs(aside), pairs, scales)


def pack_adapter(folder: Path, output: Path, spec: QuantSpec) -> dict[str, float]:
    """Store an adapter in one archive, its matrices in 4 bits.

    Args:
        folder: a peft folder.
        output: a file that ends in `.nf4dq`.
        spec: the encoding.

    Returns:
        Tensor name -> relative error ||decoded - stored|| / ||stored||.

    Raises:
        CheckpointError: the adapter is damaged.
        OutputError: see `new_archive`.
    """
    read_adapter_config(folder)
    errors = {}
    request = {"adapter": str(folder.absolute()), "spec": [spec.format, spec.block_size, spec.scale_bits]}
    with new_archive(output, request) as archive:
        for name, tensor in sorted(_weights(folder).items()):
            if not tensor.is_floating_point() or tensor.dim() < 2:
                archive.add(name, tensor)
                continue
            dense = tensor.float()
            packed = quantize(dense, spec.format, spec.block_size, spec.scale_bits)
            norm = float(dense.norm())
            errors[name] = float((packed.dequantize() - dense).norm()) / norm if norm else 0.0
            archive.add(name, packed.to(tensor.dtype))
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != ADAPTER_WEIGHTS and not file.name.startswith("."):
                archive.add_file(file.name, file.read_bytes())
    return errors


def unpack_adapter(path: Path, output: Path) -> None:
    """Write a packed adapter as a stock peft folder, its matrices decoded.

    Raises:
        CheckpointError: the archive is damaged or holds no adapter.
        OutputError: see `new_folder`.
    """
    archive = Archive(path)
    archive.verify()
    if ADAPTER_CONFIG not in archive.directory.files:
        raise CheckpointError(f"{path} holds no adapter (no {ADAPTER_CONFIG}); it is a model's archive")
    with new_folder(output) as aside:
        archive.unpack_files(aside)
        tensors = {}
        for name in archive.directory.tensors:
            tensor = archive.tensor(name)
            tensors[name] = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.clone()
        save_file(tensors, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / ADAPTER_WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None


def _is_lora(key: str) -> bool:
    return key.endswith((*_PAIRS, *_PAIRS.values()))


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """peft's rule: a pattern is a regular expression for the end of a module's name."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), name), config.get("lora_alpha") or 8)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _combinable(
    folders: Sequence[Path], scales: Sequence[float], combination_type: str, density: float | None
) -> list[dict[str, LoraPair]]:
    """The matrices of each adapter, when they can be combined."""
    from halfbyte.errors import nearest

    if combination_type not in COMBINATIONS:
        raise RequestError(
            f"combination type {combination_type!r} is not offered; {nearest(combination_type, COMBINATIONS)}"
        )
    if len(folders) < 2 or len(scales) != len(folders):
        raise RequestError(
            f"{len(folders)} adapters and {len(scales)} weights; give two adapters or more, a weight each"
        )
    if density is None and combination_type.startswith(("ties", "dare", "magnitude")):
        raise RequestError(f"{combination_type} needs a density, the share of the values to keep: 0.5, for example")
    for folder in folders:
        config = read_adapter_config(folder)
        if config.get("use_dora") or config.get("peft_type") != "LORA":
            raise RequestError(
                f"adapter {folder} is {'DoRA' if config.get('use_dora') else config.get('peft_type')}; "
                "only plain LoRA can be combined"
            )
        if config.get("target_parameters"):
            raise RequestError(
                f"adapter {folder} is on parameters ({config['target_parameters'][0]}), which peft cannot combine; "
                "merge one into the base and train the other on that"
            )
        other = next((key for key in _weights(folder) if not _is_lora(key)), None)
        if other is not None:
            raise RequestError(f"adapter {folder} holds {other}, which peft would drop when it combines adapters")
    pairs = [lora_pairs(folder) for folder in folders]
    for folder, own in zip(folders, pairs, strict=True):
        for name, pair in own.items():
            first = next(each[name] for each in pairs if name in each)
            if (pair.up.shape[0], pair.down.shape[1]) != (first.up.shape[0], first.down.shape[1]):
                raise CheckpointError(f"adapter {folder} has another shape for {name}: it is of another base")
    return pairs


def _on_stand_in(folders: Sequence[Path], pairs: Sequence[dict[str, LoraPair]]) -> Any:
    """A peft model with all adapters on it, in float32, over a base without bytes."""
    from peft import LoraConfig, PeftModel

    shapes = {name: (p.up.shape[0], p.down.shape[1]) for own in pairs for name, p in own.items()}
    embeddings = {
        key.removesuffix(".lora_embedding_A").removeprefix(_PREFIX)
        for folder in folders
        for key in _weights(folder)
        if key.endswith(".lora_embedding_A")
    }
    root = nn.Module()
    for name, (rows, columns) in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        with torch.device("meta"):
            layer: Any = nn.Embedding(columns, rows) if name in embeddings else nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
        parent.add_module(last, layer)
    model = None
    for index, folder in enumerate(folders):
        config = LoraConfig.from_pretrained(str(folder))
        # Conv1D layers are stood in for by linear ones; the matrices are the same. Nothing is started anew.
        config.fan_in_fan_out, config.init_lora_weights, config.task_type = False, True, None
        name = f"adapter{index}"
        model = PeftModel(root, config, name, low_cpu_mem_usage=True) if model is None else model
        if index:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        model.load_adapter(str(folder), name, low_cpu_mem_usage=True, torch_device="cpu", local_files_only=True)
    return model


def _distance(made: dict[str, LoraPair], pairs: Sequence[dict[str, LoraPair]], scales: Sequence[float]) -> float:
    """||made - sum|| / ||sum|| over all matrices, from the factors."""
    off = size = 0.0
    for name, pair in made.items():
        own = [(each[name], scale) for each, scale in zip(pairs, scales, strict=True) if name in each]
        up = torch.cat([p.up * p.scaling * scale for p, scale in own], dim=1)
        down = torch.cat([p.down for p, _ in own])
        size += float(LoraPair(down, up, 1.0).singular_values().square().sum())
        both = LoraPair(torch.cat([down, pair.down]), torch.cat([up, -pair.scaling * pair.up], dim=1), 1.0)
        off += float(both.singular_values().square().sum())
    return (off / size) ** 0.5 if size else 0.0
