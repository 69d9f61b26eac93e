"""What an adapter does to each weight of its base, through peft's own layers, one weight at a time.

peft merges a model that is in memory. `Overlay` builds the base's modules with weights that have a shape and no bytes
(one zero, expanded), lets peft put its layers on them and load the adapter, and then gives one layer at a time a real
weight to merge into, in float32. So every feature of peft that can be merged at all (rank and alpha patterns, rsLoRA,
DoRA, Conv1D, adapted biases, experts, modules trained whole, trained tokens) is peft's arithmetic and not a copy of it.

What cannot be merged this way is refused by its name: another kind of adapter, an initialisation that also changes the
base weights when the adapter is loaded, and any key of the adapter's file that found no place in the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.errors import CheckpointError, RequestError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
# Initialisations that take something out of the base weights, which peft does again whenever the adapter is loaded.
_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Names that peft puts into the path of a module that it wraps.
_WRAPPERS = ("base_layer", "original_module", "token_adapter", "modules_to_save", _NAME)


@dataclass(frozen=True)
class _Change:
    """What happens to one parameter: it is replaced, or a layer of peft's merges into `attribute` of its base."""

    replacement: torch.Tensor | None = None
    layer: Any = None
    attribute: str = "weight"


class Overlay:
    """An adapter over the shapes of its base.

    Args:
        model: the base; only names and shapes of it are used, and its parameters are lost.
        folder: a peft folder.

    Attributes:
        config: peft's.
        whole: names of the parameters that the adapter brings as a whole.

    Raises:
        CheckpointError: the adapter is missing or damaged, or does not fit the base; the message names a tensor.
        RequestError: it is of a kind, or has a feature, that cannot be merged.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        from peft import LoraConfig

        self.folder = folder
        self.config = _supported(read_adapter_config(folder))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        _without_bytes(model)
        before = {id(parameter): parameter for parameter in model.parameters()}  # held: an id may be used again
        peft_model = self._load(model, LoraConfig.from_pretrained(str(folder)))
        self._changes = dict(self._find(peft_model, before))
        for name, change in self._changes.items():
            if change.replacement is not None and tuple(change.replacement.shape) != shapes.get(name):
                raise CheckpointError(
                    f"adapter {folder} has {name} as {tuple(change.replacement.shape)}, and the base's is "
                    f"{shapes.get(name)}; resize the base's embeddings first, or name the right base"
                )
        self.whole = {name for name, change in self._changes.items() if change.replacement is not None}

    @torch.no_grad()
    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter with the adapter in it.

        Args:
            name: in the base model.
            weight: float32, in the shape that the base model has it; not written to.

        Returns:
            float32; `weight` itself where the adapter does not change it.

        Raises:
            CheckpointError: the result is not finite.
        """
        change = self._changes.get(name)
        if change is None:
            return weight
        if change.replacement is not None:
            return change.replacement.float()
        if change.attribute == "bias":
            trained: torch.Tensor = change.layer.lora_B[_NAME].bias * change.layer.scaling[_NAME]
            return weight + trained
        base = change.layer.get_base_layer()
        empty, biased = getattr(base, change.attribute), getattr(change.layer, "lora_bias", {})
        kept = dict(biased)
        # Plain LoRA is added to the weight in place, so it gets a copy.
        setattr(base, change.attribute, nn.Parameter(weight.clone(), requires_grad=False))
        try:
            biased.update(dict.fromkeys(biased, False))  # the bias is a parameter of its own, see above
            change.layer.merge(safe_merge=True, adapter_names=[_NAME])
            result: torch.Tensor = getattr(base, change.attribute).detach()
            return result
        except NotImplementedError as error:
            raise RequestError(f"adapter {self.folder} cannot be merged: {name}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"adapter {self.folder}: {name}: {error}") from None
        finally:
            biased.update(kept)
            change.layer.merged_adapters.clear()
            setattr(base, change.attribute, empty)

    def same(self, name: str, other: str, shape: torch.Size) -> bool:
        """Whether the adapter does the same to two parameters that are one tensor in the base."""
        if name not in self._changes and other not in self._changes:
            return True
        zero = torch.zeros(shape)
        return torch.equal(self.merged(name, zero), self.merged(other, zero))

    def _load(self, model: Any, config: Any) -> Any:
        import peft

        # The class of the task only adds what a forward needs.
        try:
            peft_model = peft.PeftModel(model, config, _NAME, low_cpu_mem_usage=True)
            result = peft_model.load_adapter(
                str(self.folder), _NAME, low_cpu_mem_usage=True, torch_device="cpu", local_files_only=True
            )
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"adapter {self.folder} does not fit the base or is damaged: {reason}") from None
        for keys, what in ((result.unexpected_keys, "which the base has no place for"), (result.missing_keys, None)):
            if keys:
                key = sorted(keys)[0]
                told = f"holds {key}, {what}" if what else f"lacks {key}"
                raise CheckpointError(f"adapter {self.folder} {told}; is it the adapter of another base?")
        return peft_model

    def _find(self, peft_model: Any, before: dict[int, nn.Parameter]) -> Iterator[tuple[str, _Change]]:
        """Parameter name -> change."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        found: set[str] = set()
        inner = peft_model.get_base_model()

        def once(name: str) -> str:
            if name in found:
                raise RequestError(
                    f"adapter {self.folder} changes {name} in two ways at once, which cannot be merged; "
                    "drop one of them with peft"
                )
            found.add(name)
            return name

        for path, module in inner.named_modules():
            name = _plain(path)
            if isinstance(module, TrainableTokensLayer):
                yield once(f"{name}.weight"), _Change(layer=module)
            elif isinstance(module, LoraLayer) and _NAME in {**module.lora_A, **module.lora_embedding_A}:
                if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                    raise RequestError(
                        f"adapter {self.folder} adapts {name}, an nn.MultiheadAttention: not merged here"
                    )
                attribute = getattr(module, "parameter_name", None) or "weight"
                yield once(f"{name}.{attribute}"), _Change(layer=module, attribute=attribute)
                if module.lora_bias.get(_NAME):
                    if getattr(module.get_base_layer(), "bias", None) is None:
                        raise RequestError(
                            f"adapter {self.folder} has a bias for {name} (lora_bias), and the base's layer has "
                            "none to merge it into"
                        )
                    yield once(f"{name}.bias"), _Change(layer=module, attribute="bias")
        for path, parameter in inner.named_parameters(remove_duplicate=False):
            if parameter.device.type == "meta":
                raise CheckpointError(f"adapter {self.folder} lacks {path}")
            whole = f".modules_to_save.{_NAME}." in f".{path}"
            from_file = id(parameter) not in before and not _is_adapters_own(path)
            if whole or (from_file and ".original_module." not in path):
                yield once(_plain(path)), _Change(replacement=parameter.detach())


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """A peft folder's config; checks that the weights are there, as safetensors.

    Raises:
        CheckpointError: something is missing, damaged, or only there as a pickle.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"adapter folder {folder} has no {ADAPTER_CONFIG}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"adapter {folder} has no {ADAPTER_WEIGHTS}; other files (pickles) are not read")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not an object")
    return config


def _supported(config: dict[str, Any]) -> dict[str, Any]:
    """The config, if what it describes can be merged."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RequestError(f"an adapter of type {kind} cannot be merged here; halfbyte merges LORA")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_REWRITING):
        raise RequestError(
            f"the adapter was started with init_lora_weights={start!r}, which changes the base weights too; save it as "
            "plain LoRA first: peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("layer_replication"):
        raise RequestError("the adapter replicates layers of its base (layer_replication), which cannot be merged")
    return config


def _without_bytes(model: nn.Module) -> None:
    """Give every parameter and buffer its shape on the CPU and no memory, tied ones one tensor."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    # float32: peft casts an adapter to its base's dtype
                    zero = torch.zeros(()).expand(parameter.shape)
                    made[id(parameter)] = nn.Parameter(zero, requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def _plain(path: str) -> str:
    """A path in a model that peft has wrapped, as it is in the base."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _is_adapters_own(path: str) -> bool:
    """Whether a parameter is peft's (A, B, a magnitude, token rows) and not one of the base's."""
    parts = path.split(".")
    return any(part.startswith("lora_") or part.startswith("trainable_tokens") for part in parts)
