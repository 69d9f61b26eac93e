"""What a fused product on a GPU is given: `vector.py` and `tiles.py` multiply it, `linear.py` chooses between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from halfbyte.kernels.triton.weights import Weight


class Branch(NamedTuple):
    """What an adapter adds to a product: scaling * inputs b^T.

    Attributes:
        inputs: x A^T, [rows, rank], in x's dtype, contiguous.
        b: [outputs, rank], any floating dtype, contiguous.
        scaling: lora_alpha / rank, usually.
    """

    inputs: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def padded_rank(self) -> int:
        """A power of two that tensor cores take."""
        return max(16, triton.next_power_of_2(self.b.shape[-1]))


class Product(NamedTuple):
    """y [rows, n] = x [rows, k] W^T + bias + branch; or, with `gradient`, y [rows, k] = x [rows, n] W.

    Attributes:
        weight: W [n, k].
        group: neighbours in a row of W that are sure to share a scale, from each multiple of it on; 32 or more.
        rows: of x.
        n: rows of W.
        k: columns of W.
        x: contiguous.
        out: contiguous, x's dtype.
        bias: [n], x's dtype, or None.
        branch: or None.
        gradient: whether it is the way back.
    """

    weight: Weight
    group: int
    rows: int
    n: int
    k: int
    x: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None = None
    branch: Branch | None = None
    gradient: bool = False
