"""What a decoder step is told: the contract between `halfbyte.infer` and the kernels that decode.

The decoder is the Llama family's: norm, attention with rotary positions over a cache, norm, a gated pair of
projections, each half added to what went in. Tokens of several sequences are decoded together; each sequence has a slot
of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from halfbyte.errors import ShapeError
from halfbyte.kernels.schema import PackedWeight

KEY_BLOCK = 16  # positions side by side in the key cache
STEP_ROWS = 128  # HB_STEP_ROWS: tokens that the native step takes at most
ACTIVATIONS = ("silu", "gelu_tanh")  # numbered as enum hb_activation
PARTS = ("norms", "products", "attention", "head")  # where a step's time goes; numbered as enum hb_part
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # in the order of hb_layer


class Branch(NamedTuple):
    """What an adapter adds to one matrix: x a^T b^T, scaling included.

    Attributes:
        a: [rank, k], float32 or bfloat16.
        b: [n, rank], the same dtype.
    """

    a: torch.Tensor
    b: torch.Tensor


Branches = Mapping[tuple[int, str], Branch]  # of one adapter, by layer and matrix
Mix = Sequence[tuple[int, float]]  # a row's adapters, by number, and their weights
# Called with a layer's number before a step reads its weights; the number of layers stands for the head. Returns at
# which number, above that, it is to be called next.
Enter = Callable[[int], int]


@dataclass(frozen=True)
class Matrix:
    """W [n, k] of y = x W^T + bias.

    Attributes:
        weight: packed, or dense: float32 or bfloat16 [n, k].
        n: outputs.
        k: inputs.
        bias: float32 [n], or None.
    """

    weight: PackedWeight | torch.Tensor
    n: int
    k: int
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        matrices: by the names in `MATRICES`.
        attention_norm: float32 [hidden].
        mlp_norm: float32 [hidden].
        query_norm: float32 [head_dim], or None.
        key_norm: float32 [head_dim], or None.
        window: the last positions that a token sees, its own included; 0: all.
    """

    matrices: Mapping[str, Matrix]
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    window: int = 0


@dataclass(frozen=True)
class Network:
    """All layers and what they share.

    Attributes:
        table: embeddings [vocabulary, hidden], dense or quantized.
        embedding_scale: what every embedding is multiplied by.
        layers: in their order.
        final_norm: float32 [hidden].
        head: [vocabulary, hidden].
        cosine: float32 [positions, head_dim], of the rotary angles.
        sine: likewise.
        heads: of queries.
        kv_heads: of keys and values; divides `heads`.
        eps: of the norms.
        attention_scale: of the scores.
        activation: one of `ACTIVATIONS`.
    """

    table: torch.Tensor
    embedding_scale: float
    layers: Sequence[Layer]
    final_norm: torch.Tensor
    head: Matrix
    cosine: torch.Tensor
    sine: torch.Tensor
    heads: int
    kv_heads: int
    eps: float
    attention_scale: float
    activation: str

    @property
    def head_dim(self) -> int:
        """Numbers in a head."""
        return self.cosine.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.table.device

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids -> float32 [len(tokens), hidden], contiguous, the caller's own."""
        rows = torch.nn.functional.embedding(torch.tensor(tokens, device=self.device), self.table)
        return rows.to(torch.float32, copy=rows.dtype == torch.float32).mul_(self.embedding_scale)


@dataclass(frozen=True)
class Cache:
    """Keys and values of every token seen, for each layer and slot.

    Attributes:
        keys: float32, bfloat16 or int8 [layers, slots, kv_heads, positions / 16, head_dim, 16].
        values: the same dtype [layers, slots, kv_heads, positions, head_dim].
        key_scales: float32 [layers, slots, kv_heads, positions] where keys are int8, else None.
        value_scales: likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def empty(cls, network: Network, slots: int, dtype: torch.dtype) -> Cache:
        """A cache for `slots` sequences of as many positions as there are angles, beside the network.

        The CPU takes memory when it is used, a GPU at once.
        """
        positions, dim = network.cosine.shape
        shape = (len(network.layers), slots, network.kv_heads, positions)
        with network.device:
            keys = torch.empty((*shape[:-1], positions // KEY_BLOCK, dim, KEY_BLOCK), dtype=dtype)
            values = torch.empty((*shape, dim), dtype=dtype)
            if dtype != torch.int8:
                return cls(keys, values)
            return cls(keys, values, torch.empty(shape), torch.empty(shape))

    @staticmethod
    def bytes_of_slot(network: Network, dtype: torch.dtype) -> int:
        """What a slot of an `empty` cache takes."""
        positions, dim = network.cosine.shape
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return 2 * len(network.layers) * network.kv_heads * positions * (dim * dtype.itemsize + scale)

    @property
    def slots(self) -> int:
        """Sequences that it holds."""
        return self.values.shape[1]

    @property
    def positions(self) -> int:
        """Tokens of each."""
        return self.values.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, used or not."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One layer's keys, values and their scales."""
        of_keys, of_values = (
            None if scales is None else scales[number] for scales in (self.key_scales, self.value_scales)
        )
        return self.keys[number], self.values[number], of_keys, of_values

    def copy(self, source: int, target: int, count: int) -> None:
        """Give slot `target` the first `count` positions of slot `source`."""
        blocks = -(-count // KEY_BLOCK)
        self.keys[:, target, :, :blocks] = self.keys[:, source, :, :blocks]
        self.values[:, target, :, :count] = self.values[:, source, :, :count]
        for scales in (self.key_scales, self.value_scales):
            if scales is not None:
                scales[:, target, :, :count] = scales[:, source, :, :count]


class Decoder(Protocol):
    """Something that runs a network.

    Attributes:
        seconds: that its steps took since it was made, by the names in `PARTS`; by others where it cannot tell these.
    """

    seconds: Mapping[str, float]

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Take tokens through all layers, storing their keys and values.

        Args:
            tokens: [rows], ids.
            slots: [rows], each token's place in the cache; tokens of one slot stand together, in their order.
            positions: [rows]; all earlier positions of the slot are in the cache, or among these rows.
            mixes: [rows], each token's adapters; None: no adapters.
            wanted: the rows whose logits are computed; None: all.

        Returns:
            float32 [len(wanted), vocabulary].
        """

    def set_adapters(self, adapters: Sequence[Branches]) -> None:
        """The adapters that mixes name by number; replaces all earlier ones."""


class Step(NamedTuple):
    """The arguments of `Decoder.step`."""

    tokens: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    mixes: Sequence[Mix] | None
    wanted: Sequence[int] | None

    def check(self, network: Network, cache: Cache, adapters: int) -> None:
        """Refuse what would be read or written outside of a tensor, by a kernel that has no bounds.

        Raises:
            ShapeError: there are no rows, or more than `STEP_ROWS`; or a slot, position, adapter or wanted row does not
                exist.
            IndexError: a token does not.
        """
        rows, slots, positions = len(self.tokens), self.slots, self.positions
        lengths = {len(slots), len(positions), rows if self.mixes is None else len(self.mixes)}
        if not 0 < rows <= STEP_ROWS or lengths != {rows}:
            raise ShapeError(f"a step takes 1 to {STEP_ROWS} tokens, each with a slot and a position, not {rows}")
        if min(slots) < 0 or max(slots) >= cache.slots:
            raise ShapeError(f"slots {min(slots)} to {max(slots)}, and the cache has {cache.slots}")
        if min(positions) < 0 or max(positions) >= cache.positions:
            raise ShapeError(f"positions {min(positions)} to {max(positions)}, and the cache has {cache.positions}")
        if any(not 0 <= adapter < adapters for mix in self.mixes or () for adapter, _ in mix):
            raise ShapeError(f"a row names an adapter that is not among the {adapters} there are")
        if self.wanted is not None and (len(self.wanted) > rows or any(not 0 <= row < rows for row in self.wanted)):
            raise ShapeError(f"logits of the rows {list(self.wanted)} are asked for, and there are {rows}")
        vocabulary = network.table.shape[0]
        if min(self.tokens) < 0 or max(self.tokens) >= vocabulary:
            wrong = min(self.tokens) if min(self.tokens) < 0 else max(self.tokens)
            raise IndexError(f"token {wrong} is not among the {vocabulary} there are")
