"""What products with packed weights cost, taken apart: measured on a network's own matrices, for one row.

Decoding scales, looking codes up and multiplying are one loop of the kernel, in which a clock would cost more than what
it measures. So their shares are differences between whole runs: with scales that are decoded already, and of reading
the codes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from halfbyte.formats import double_quant
from halfbyte.kernels.decoder import Network
from halfbyte.kernels.schema import PackedWeight

_ROUNDS = 5  # of which the fastest counts: other programs only ever add time
_ENOUGH = 1 << 26  # bytes of codes; more than the caches of most cores hold
_PIECE = 1 << 20  # bytes that are read at a time, into a buffer that stays in the cache


@dataclass(frozen=True)
class ProductCosts:
    """Seconds of the same products, done in three ways.

    Attributes:
        matrices: so many were multiplied.
        nbytes: of their codes.
        seconds: as they are.
        plain: with scales in float32, decoded beforehand; as `seconds` where they are stored so.
        reading: of their codes only.
    """

    matrices: int
    nbytes: int
    seconds: float
    plain: float
    reading: float

    @property
    def shares(self) -> dict[str, float]:
        """Of `seconds`, by what it was spent on; their sum is 1."""
        scales = max(self.seconds - self.plain, 0.0) / self.seconds
        reading = min(self.reading / self.seconds, 1.0 - scales)
        return {"scale decoding": scales, "reading": reading, "table lookup and multiplication": 1.0 - scales - reading}


def product_costs(network: Network) -> ProductCosts | None:
    """Measure. Takes some tenths of a second; None where no matrix of the layers is packed, or they are on a card."""
    if network.device.type != "cpu":
        return None
    chosen: list[tuple[PackedWeight, int, int]] = []
    nbytes = 0
    for layer in network.layers:
        for matrix in layer.matrices.values():
            if isinstance(matrix.weight, PackedWeight) and nbytes < _ENOUGH:
                chosen.append((matrix.weight, matrix.n, matrix.k))
                nbytes += matrix.n * matrix.k // 2
    if not chosen:
        return None
    plain = [(_with_plain_scales(weight, n * k), n, k) for weight, n, k in chosen]
    rows = {k: torch.randn(1, k) for _, _, k in chosen}
    buffer = torch.empty(_PIECE, dtype=torch.uint8)

    def multiply(weights: Sequence[tuple[PackedWeight, int, int]]) -> None:
        for weight, n, k in weights:
            torch.ops.halfbyte.linear(*weight, n, rows[k], None)

    def read() -> None:
        for weight, n, k in chosen:
            for piece in weight.codes[: n * k // 2].split(_PIECE):
                buffer[: piece.numel()].copy_(piece)

    ways: list[Callable[[], None]] = [lambda: multiply(chosen), lambda: multiply(plain), read]
    best = [float("inf")] * len(ways)
    for _ in range(_ROUNDS):
        for index, way in enumerate(ways):
            began = time.perf_counter()
            way()
            best[index] = min(best[index], time.perf_counter() - began)
    return ProductCosts(len(chosen), nbytes, *best)


def _with_plain_scales(weight: PackedWeight, count: int) -> PackedWeight:
    if weight.scale_bits == 0:
        return weight
    assert weight.scale_absmax is not None and weight.scale_offset is not None
    blocks = -(-(weight.start + count) // weight.block_size)
    second = weight.scale_absmax, weight.scale_offset, weight.scale_bits
    scales = double_quant.dequantize_scales(weight.scales, *second, blocks, weight.scale_start)
    return weight._replace(scales=scales, scale_absmax=None, scale_offset=None, scale_bits=0, scale_start=0)
