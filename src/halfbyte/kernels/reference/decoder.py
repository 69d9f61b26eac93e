"""A decoder step in torch operations: the reference, and what prompts go through, whose products have many rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from halfbyte.kernels.decoder import KEY_BLOCK, Branches, Cache, Layer, Matrix, Mix, Network
from halfbyte.kernels.schema import PackedWeight


class TorchDecoder:
    """Runs a network with torch's operations and halfbyte's products, on the device of its tensors.

    Args:
        network: what to run.
        cache: where keys and values are kept.
        dtype: of the activations that enter products; everything between them is float32.
    """

    def __init__(self, network: Network, cache: Cache, dtype: torch.dtype) -> None:
        self.network, self.cache, self.dtype = network, cache, dtype
        self.adapters: Sequence[Branches] = ()

    def set_adapters(self, adapters: Sequence[Branches]) -> None:
        """See `Decoder.set_adapters`."""
        self.adapters = adapters

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        logits: bool = True,
    ) -> torch.Tensor | None:
        """See `Decoder.step`."""
        network, at = self.network, torch.tensor(positions)
        hidden = network.embed(tokens)
        groups = _groups(slots, mixes)
        cosine, sine = network.cosine[at].unsqueeze(1), network.sine[at].unsqueeze(1)
        for number, layer in enumerate(network.layers):
            x = self._norm(hidden, layer.attention_norm)
            query, key, value = (
                self._product(x, layer.matrices[name], (number, name), groups).unflatten(-1, (-1, network.head_dim))
                for name in ("query", "key", "value")
            )
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
            self._store(number, slots, at, key, value)
            mixed = [
                self._attend(number, layer, slots[rows.start], at[rows], query[rows], key[rows], value[rows])
                for rows, _ in groups
            ]
            hidden += self._product(torch.cat(mixed), layer.matrices["output"], (number, "output"), groups)
            x = self._norm(hidden, layer.mlp_norm)
            gate = self._product(x, layer.matrices["gate"], (number, "gate"), groups)
            up = self._product(x, layer.matrices["up"], (number, "up"), groups)
            hidden += self._product(self._activate(gate) * up, layer.matrices["down"], (number, "down"), groups)
        if not logits:
            return None
        return self._product(self._norm(hidden, network.final_norm), network.head, None, groups)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.halfbyte.rms_norm(x, weight, self.network.eps)[0]
        return result

    def _activate(self, gate: torch.Tensor) -> torch.Tensor:
        if self.network.activation == "silu":
            return functional.silu(gate)
        return functional.gelu(gate, approximate="tanh")

    def _product(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        where: tuple[int, str] | None,
        groups: Sequence[tuple[slice, Mix]],
    ) -> torch.Tensor:
        """x [rows, k] -> float32 [rows, n]."""
        cast = x.to(self.dtype)
        weight = matrix.weight
        if isinstance(weight, PackedWeight):
            y = torch.ops.halfbyte.linear(*weight, matrix.n, cast, None).float()
        else:
            y = functional.linear(x.to(weight.dtype), weight).float()
        if matrix.bias is not None:
            y += matrix.bias
        for rows, mix in groups:
            for number, share in mix:
                branch = None if where is None else self.adapters[number].get(where)
                if branch is not None:
                    middle = cast[rows].to(branch.a.dtype) @ branch.a.t()
                    y[rows] += (middle @ branch.b.t()).float() * share
        return y

    def _store(
        self, layer: int, slots: Sequence[int], at: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put keys and values [rows, kv_heads, head_dim] into the cache."""
        cache, slot = self.cache, torch.tensor(slots)
        if cache.key_scales is not None and cache.value_scales is not None:
            key, cache.key_scales[layer, slot, :, at] = _to_bytes(key)
            value, cache.value_scales[layer, slot, :, at] = _to_bytes(value)
        block, offset = at // KEY_BLOCK, at % KEY_BLOCK
        cache.keys[layer, slot, :, block, :, offset] = key.to(cache.keys.dtype)
        cache.values[layer, slot, :, at] = value.to(cache.values.dtype)

    def _attend(
        self,
        layer: int,
        description: Layer,
        slot: int,
        at: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Rows of one slot, at positions `at`, over all that the slot holds -> [rows, heads * head_dim]."""
        count = int(at.max()) + 1
        dtype = self.dtype if self.dtype != torch.float16 else torch.float32
        if len(at) == count:  # nothing came before: the keys need not be read back
            keys, values = key.transpose(0, 1), value.transpose(0, 1)
        else:
            keys, values = self._read(layer, slot, count)
        # Causal alone is a case that torch has a faster kernel for.
        whole = len(at) == count and not (0 < description.window < count)
        mask = None
        if not whole:
            positions = torch.arange(count)
            mask = positions <= at[:, None]
            if description.window:
                mask &= positions > at[:, None] - description.window
        y = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None].to(dtype),
            keys[None].to(dtype),
            values[None].to(dtype),
            mask,
            is_causal=whole,
            scale=self.network.attention_scale,
            enable_gqa=True,
        )
        return y[0].transpose(0, 1).flatten(1).float()

    def _read(self, layer: int, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` keys and values of a slot, each [kv_heads, count, head_dim]."""
        cache = self.cache
        blocks = cache.keys[layer, slot, :, : -(-count // KEY_BLOCK)]
        keys = blocks.transpose(-1, -2).flatten(1, 2)[:, :count]
        values = cache.values[layer, slot, :, :count]
        if cache.key_scales is not None and cache.value_scales is not None:
            keys = keys * cache.key_scales[layer, slot, :, :count, None]
            values = values * cache.value_scales[layer, slot, :, :count, None]
        return keys, values


def _groups(slots: Sequence[int], mixes: Sequence[Mix] | None) -> list[tuple[slice, Mix]]:
    """Runs of rows that share a slot, and so their adapters."""
    groups: list[tuple[slice, Mix]] = []
    begin = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[begin]:
            groups.append((slice(begin, row), mixes[begin] if mixes is not None else ()))
            begin = row
    return groups


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _to_bytes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, heads, dim] as int8 with a scale for each vector: its largest magnitude becomes 127."""
    most = x.abs().amax(-1)
    scale = torch.where(most > 0, most / 127, 1.0)
    return (x * (1.0 / scale).unsqueeze(-1)).round(), scale
