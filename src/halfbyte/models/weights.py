"""The weights of a model on disk as plain numbers, whatever they are stored in.

A 16-bit folder, a 4-bit folder (bitsandbytes' keys or halfbyte's own) and an archive all give the same thing here: a
name, a shape, and the values in float32, a few rows at a time. Nothing is read before it is asked for, and then it is
one tensor in its stored form and one piece of it decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from halfbyte.errors import CheckpointError
from halfbyte.models.checkpoint import Checkpoint, LazyTensor
from halfbyte.tensor import QuantizedTensor, is_state_key, read_shape, read_spec, unflatten

# Elements decoded at once: enough for the decoder to run at its pace, few beside any model.
_PIECE = 1 << 22
_DENSE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Weight:
    """One tensor of a model.

    Attributes:
        name: its name, "model.layers.0.mlp.up_proj.weight".
        shape: the shape that it stands for.
        stored: what it is stored as: "F32", "F16", "BF16", "F64", or a 4-bit or 8-bit format ("nf4", ...).
        parts: the keys in the file that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    parts: tuple[LazyTensor, ...]

    @property
    def packed(self) -> bool:
        """Whether it is stored in 4 or 8 bits."""
        return self.stored not in _DENSE

    def read(self) -> torch.Tensor:
        """The tensor as it is stored: a `QuantizedTensor`, or a plain one.

        Raises:
            CheckpointError: the file is damaged.
        """
        if len(self.parts) == 1:
            return self.parts[0].read()
        return unflatten(self.name, {part.name: part.read() for part in self.parts})

    def pieces(self, order: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The values in float32, a few rows at a time.

        Args:
            order: int64 [rows], the row to give at each place; None: as they are stored.

        Raises:
            CheckpointError: the file is damaged.
        """
        tensor = self.read()
        if order is not None:
            # Packed rows do not begin at block boundaries, so they are reordered when they are decoded.
            dense = tensor.dequantize(torch.float32) if isinstance(tensor, QuantizedTensor) else tensor
            tensor = dense[order]
        width = max(1, torch.Size(self.shape[1:]).numel())
        rows = max(1, _PIECE // width)
        for start in range(0, self.shape[0] if self.shape else 1, rows):
            piece = tensor[start : start + rows] if self.shape else tensor
            if isinstance(piece, QuantizedTensor):
                yield piece.dequantize(torch.float32)
            else:
                yield piece.to(torch.float32)


def read_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Every weight of a model, by name, in the order of the file.

    Raises:
        CheckpointError: a tensor is stored in something that is not read here (float8, integers without a description),
            or its description is damaged.
    """
    states = {key.partition(".quant_state.")[0]: key for key in checkpoint if ".quant_state." in key}
    companions: dict[str, list[LazyTensor]] = {name: [checkpoint[name]] for name in states if name in checkpoint}
    for key in checkpoint:
        owner = key.partition(".quant_state.")[0] if ".quant_state." in key else key.rpartition(".")[0]
        if owner in companions and is_state_key(key):
            companions[owner].append(checkpoint[key])
    weights = {}
    for name, lazy in checkpoint.items():
        if name in companions:
            state = checkpoint[states[name]].read()
            stored, shape = read_spec(states[name], state).format, read_shape(states[name], state)
            weights[name] = Weight(name, shape, stored, tuple(companions[name]))
        elif not (is_state_key(name) and _owner(name) in companions):
            weights[name] = Weight(name, tuple(lazy.shape), _stored(checkpoint, lazy), (lazy,))
    return weights


def _owner(key: str) -> str:
    return key.partition(".quant_state.")[0] if ".quant_state." in key else key.rpartition(".")[0]


def _stored(checkpoint: Checkpoint, lazy: LazyTensor) -> str:
    stored = lazy.stored
    if stored in _DENSE or not stored.isupper():
        return stored
    raise CheckpointError(
        f"{checkpoint.path} stores {lazy.name} as {stored}; halfbyte reads {', '.join(_DENSE)} and its own formats"
    )
