"""LoftQ for a model that is already in 4 bits: start the adapter at what quantization lost.

LoftQ (arXiv 2310.08659) begins with B A close to W - dequantize(Q), instead of at zero. peft's own initialisation
computes that from the weight in the layer, which has to be the unquantized one; in a 4-bit layer the difference is
zero, both factors come out as zero, and an adapter whose two factors are zero gets no gradient and never learns. So
it is refused there, and done here: the original weights are read from their folder, one at a time, and the packed
ones are left alone (one iteration of the paper's algorithm, as peft's `replace_lora_weights_loftq` does it for
bitsandbytes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.loading import resolve
from halfbyte.models.sources import open_checkpoint
from halfbyte.nn import Linear4bit
from halfbyte.tensor import QuantizedTensor


@torch.no_grad()
def init_loftq(model: Any, path: str | Path, adapter_name: str = "default") -> float:
    """Set every adapter of a peft model over 4-bit layers to the best approximation of its quantization error.

    Args:
        model: a peft model on a model that halfbyte quantized.
        path: the folder of the unquantized model, or its name on the hub.
        adapter_name: which adapter.

    Returns:
        The share of the squared quantization error that the adapters take away, 0 to 1.

    Raises:
        RequestError: the model has no such adapter on a 4-bit layer.
        CheckpointError: the folder lacks a weight, or it belongs to another model.
    """
    checkpoint = open_checkpoint(resolve(path))
    before = after = 0.0
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, Linear4bit) or adapter_name not in getattr(layer, "lora_A", {}):
            continue
        if not isinstance(base.weight, QuantizedTensor):
            raise RequestError(f"{name} holds merged adapters; unmerge them before init_loftq")
        error = _original(checkpoint, name, base.weight) - base.weight.dequantize(torch.float32)
        rank = layer.r[adapter_name]
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        # peft multiplies B A by its scaling; the product has to come out as the error itself.
        for factor, value in (
            (layer.lora_B[adapter_name].weight, u[:, :rank] * root / layer.scaling[adapter_name]),
            (layer.lora_A[adapter_name].weight, root[:, None] * v[:rank]),
        ):
            factor.copy_(value)
        before += s.square().sum().item()
        after += s[rank:].square().sum().item()
    if not before:
        raise RequestError(f"the model has no adapter {adapter_name!r} on a layer that halfbyte quantized")
    return 1 - after / before


def _original(checkpoint: Checkpoint, name: str, packed: QuantizedTensor) -> torch.Tensor:
    """The unquantized weight of a layer: float32 [out, in]."""
    stored = name.removeprefix("base_model.model.") + ".weight"
    # A checkpoint of the bare model lacks the first part of the path (gpt2: "h.0..." for "transformer.h.0...").
    key = next((key for key in (stored, stored.partition(".")[2]) if key in checkpoint), None)
    if key is None:
        raise CheckpointError(f"{checkpoint.path} has no {stored}, so it is not the model that the adapter sits on")
    weight = checkpoint[key].read().float()
    decoded = packed.dequantize(torch.float32)
    fits = [one for one in (weight, weight.T) if one.shape == decoded.shape]
    # GPT-2 stores its weights transposed, and some are square: the right way round is the one that was quantized.
    best = min(fits, key=lambda one: (one - decoded).square().sum().item(), default=None)
    if best is None or (best - decoded).square().sum() > 0.5 * best.square().sum():
        raise CheckpointError(f"{key} in {checkpoint.path} is not the weight that was quantized")
    return best
