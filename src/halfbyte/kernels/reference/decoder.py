"""A decoder step in torch operations: the reference, and what prompts go through, whose products have many rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from halfbyte.kernels.decoder import KEY_BLOCK, PARTS, Branches, Cache, Enter, Layer, Matrix, Mix, Network
from halfbyte.kernels.schema import PackedWeight

_WIDENED_ROWS = 4096  # of a dense matrix that is stored in fewer bits than it is multiplied in


class TorchDecoder:
    """Runs a network with torch's operations and halfbyte's, on the device of its tensors.

    In bfloat16 it rounds where transformers does: what products take and give, norms, rotated heads, gates, and the sum
    that goes from layer to layer. Large tensors between the products are what a prompt's time goes to besides them.

    Args:
        network: what to run.
        cache: where keys and values are kept.
        dtype: of all activations; logits are float32.
        enter: see `Enter`; None: all weights are there.
    """

    def __init__(self, network: Network, cache: Cache, dtype: torch.dtype, enter: Enter | None = None) -> None:
        self.network, self.cache, self.dtype, self._enter = network, cache, dtype, enter
        self.adapters: Sequence[Branches] = ()
        # A GPU computes behind the host: of a step only the whole is known, which ends when the logits have come.
        self._parts = PARTS if network.device.type == "cpu" else ("forward",)
        self.seconds = dict.fromkeys(self._parts, 0.0)
        self._lap_began = 0.0
        self._angles = network.cosine.to(dtype), network.sine.to(dtype)
        self._final_norm = narrow(network.final_norm, dtype)
        self._layers = [
            replace(
                layer,
                attention_norm=narrow(layer.attention_norm, dtype),
                mlp_norm=narrow(layer.mlp_norm, dtype),
                query_norm=None if layer.query_norm is None else narrow(layer.query_norm, dtype),
                key_norm=None if layer.key_norm is None else narrow(layer.key_norm, dtype),
            )
            for layer in network.layers
        ]

    def set_adapters(self, adapters: Sequence[Branches]) -> None:
        """See `Decoder.set_adapters`."""
        self.adapters = adapters

    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """See `Decoder.step`."""
        self._lap_began = time.perf_counter()
        network, at = self.network, torch.tensor(positions, device=self.network.device)
        hidden = network.embed(tokens).to(self.dtype)
        groups = _groups(slots, mixes)
        angles = tuple(table[at][None] for table in self._angles)
        following = 0
        for number, layer in enumerate(self._layers):
            following = self._wait(number, following)
            x = self._norm(hidden, layer.attention_norm)
            self._lap("norms")
            query, key, value = (
                self._product(x, layer.matrices[name], (number, name), groups).unflatten(-1, (-1, network.head_dim))
                for name in ("query", "key", "value")
            )
            self._lap("products")
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
            query, key = (torch.ops.halfbyte.rotary(heads[None], *angles, False)[0] for heads in (query, key))
            self._store(number, slots, at, key, value)
            mixed = [
                self._attend(number, layer, (slots[rows.start], positions[rows]), query[rows], key[rows], value[rows])
                for rows, _ in groups
            ]
            mixed_rows = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
            self._lap("attention")
            hidden += self._product(mixed_rows, layer.matrices["output"], (number, "output"), groups)
            self._lap("products")
            x = self._norm(hidden, layer.mlp_norm)
            self._lap("norms")
            gate = self._product(x, layer.matrices["gate"], (number, "gate"), groups)
            up = self._product(x, layer.matrices["up"], (number, "up"), groups)
            hidden += self._product(self._gate(gate, up), layer.matrices["down"], (number, "down"), groups)
            self._lap("products")
        if wanted is not None:
            hidden = hidden[list(wanted)]
        if len(hidden):
            self._wait(len(self._layers), following)
        logits = self._product(self._norm(hidden, self._final_norm), network.head, None, ()).float().cpu()
        self._lap("head")
        return logits

    def _wait(self, number: int, following: int) -> int:
        """Call `enter` if its turn has come; the time that it takes belongs to no part."""
        if self._enter is None or number != following:
            return following
        following = self._enter(number)
        self._lap_began = time.perf_counter()
        return following

    def _lap(self, part: str) -> None:
        """What was done since the last call belongs to `part`, where parts can be told."""
        now = time.perf_counter()
        self.seconds[part if part in self._parts else self._parts[0]] += now - self._lap_began
        self._lap_began = now

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.halfbyte.rms_norm(x, weight, self.network.eps)[0]
        return result

    def _gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.network.activation == "silu":
            result: torch.Tensor = torch.ops.halfbyte.swiglu(gate, up)
            return result
        return functional.gelu(gate, approximate="tanh") * up

    def _product(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        where: tuple[int, str] | None,
        groups: Sequence[tuple[slice, Mix]],
    ) -> torch.Tensor:
        """x [rows, k] -> [rows, n], both of `dtype`."""
        weight, bias = matrix.weight, None if matrix.bias is None else matrix.bias.to(self.dtype)
        if isinstance(weight, PackedWeight):
            y: torch.Tensor = torch.ops.halfbyte.linear(*weight, matrix.n, x, bias)
        else:
            y = dense(x, weight, bias)
        for rows, mix in groups:
            for number, share in mix:
                branch = None if where is None else self.adapters[number].get(where)
                if branch is not None:
                    middle = x[rows].to(branch.a.dtype) @ branch.a.t()
                    y[rows] += (middle @ branch.b.t()).to(y.dtype) * share
        return y

    def _store(
        self, layer: int, slots: Sequence[int], at: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put keys and values [rows, kv_heads, head_dim] into the cache."""
        cache, slot = self.cache, torch.tensor(slots, device=at.device)
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
        where: tuple[int, Sequence[int]],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Rows `where` (slot, positions), over all that the slot holds -> [rows, heads * head_dim]."""
        slot, at = where
        count = max(at) + 1
        if len(at) == count:  # nothing came before: the keys need not be read back
            keys, values = key.transpose(0, 1), value.transpose(0, 1)
        else:
            keys, values = (read.to(self.dtype) for read in self._read(layer, slot, count))
        # Causal alone is a case that torch has a faster kernel for.
        whole = len(at) == count and not (0 < description.window < count)
        mask = None
        if not whole:
            positions = torch.arange(count, device=query.device)
            own = torch.tensor(at, device=query.device)[:, None]
            mask = positions <= own
            if description.window:
                mask &= positions > own - description.window
        # Query heads that share a key head are the heads of one batch entry, over one key head that is seen repeated:
        # with `enable_gqa` torch would copy keys and values for each of them.
        group = self.network.heads // self.network.kv_heads
        y = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unflatten(0, (-1, group)),
            keys[:, None].expand(-1, group, -1, -1),
            values[:, None].expand(-1, group, -1, -1),
            mask,
            is_causal=whole,
            scale=self.network.attention_scale,
        )
        return y.flatten(0, 1).transpose(0, 1).flatten(1)

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


def narrow(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in `dtype` if that changes no number, as it is else: norms multiply in float32 in any case."""
    narrow = weight.to(dtype)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias in x's dtype, multiplied in the wider of the two dtypes; a large W is widened in parts."""
    if x.dtype == weight.dtype:
        return functional.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = torch.cat([functional.linear(x.to(wide), rows.to(wide)) for rows in weight.split(_WIDENED_ROWS)], dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)


def _to_bytes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, heads, dim] as int8 with a scale for each vector: its largest magnitude becomes 127."""
    most = x.abs().amax(-1)
    scale = torch.where(most > 0, most / 127, 1.0)
    return (x * (1.0 / scale).unsqueeze(-1)).round(), scale
