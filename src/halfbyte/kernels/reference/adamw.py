"""The AdamW step written with torch, for any device: what every native step must equal to the bit.

Decoupled weight decay (arXiv 1711.05101); with g the gradient times the clipping scale::

    m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g g
    p = p (1 - lr wd) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Roundings are those of the peers, so that states are equal to theirs to the bit. float32 states follow torch's fused
AdamW, which takes the first moment as m + (1 - beta1)(g - m); 8-bit states follow bitsandbytes 0.50's CPU step. Both
fuse a multiplication and an addition in each moment. `_fma` computes that in float64: exact but for a second rounding,
which matters in about one of 2**29 results.

8-bit codes are the *nearest* entries, as bitsandbytes' CUDA kernels and its portable code choose them. Its native CPU
quantizer first rounds to a grid of 65,536 points in [-1, 1]: below 1.5e-5 of a block's largest value everything
becomes the same number, and zero becomes 2.1e-5 (first moment) or 1.6e-5 (second) of it; see docs/log.md.

4-bit states are those of "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507): first moments in blocks of
128 with the dynamic-exponent map, second moments with (i + 1) / 16, i = 0..15, scaled for a matrix by the smaller of
its row's and its column's largest value ("rank-1"), for a vector in blocks of 128. Parameters of more than two
dimensions are taken as matrices [shape[0], rest], where the paper takes the smallest of all dimensions' maxima.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.formats.blockwise import dequantize, quantize
from halfbyte.formats.codebooks import MOMENT1_4BIT, MOMENT1_8BIT, MOMENT2_4BIT, MOMENT2_8BIT, Codebook
from halfbyte.formats.packing import pack, unpack
from halfbyte.kernels.slots import BLOCK_4BIT, BLOCK_8BIT, Options, Slot

_TINY = 1e-38
_MASK = 0xFFFFFFFF


class ReferenceBatch:
    """A `halfbyte.kernels.slots.Batch` of torch operations, one slot after the other."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots

    def norms(self, grads: Sequence[torch.Tensor | None]) -> list[float]:
        """See `Batch.norms`. A GPU is waited for once."""
        numbers: list[float] = self.squares(grads).tolist() if self.slots else []
        return numbers

    def squares(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """See `DeviceBatch.squares`."""
        found = [
            torch.zeros((), dtype=torch.float64, device=slot.param.device)
            if grad is None
            else _range(grad, slot).double().square().sum()
            for slot, grad in zip(self.slots, grads, strict=True)
        ]
        return torch.stack(found)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        options: Sequence[Options],
        which: Sequence[int],
        keys: np.ndarray,
    ) -> None:
        """See `Batch.step`."""
        for slot, grad, number, key in zip(self.slots, grads, which, keys.tolist(), strict=True):
            if grad is not None:
                adamw(slot, _range(grad, slot).float(), options[number], key)


def adamw(slot: Slot, grad: torch.Tensor, options: Options, key: Sequence[int]) -> None:
    """One step of one slot.

    Args:
        slot: changed in place.
        grad: float32 [slot.count].
        options: numbers of the step.
        key: two numbers below 2**32, for stochastic rounding.
    """
    o: Any = Options(*(torch.tensor(value, dtype=torch.float32, device=grad.device) for value in options))  # type: ignore[arg-type]
    whole = slot.param.detach().reshape(-1)  # a copy where it is not contiguous
    param = whole[slot.first : slot.first + slot.count]
    moment1, moment2 = _decode(slot)
    grad = grad * o.grad_scale
    if slot.kind != "float32":
        moment1 = _fma(grad, o.weight1, moment1 * o.beta1)
    elif options.weight1 < 0.5:
        moment1 = _fma(o.weight1, grad - moment1, moment1)
    else:
        moment1 = _fma(o.weight1 - 1, grad - moment1, grad)
    moment2 = _fma(grad * o.weight2, grad, moment2 * o.beta2)
    # torch's float32 square root on a CPU may be off by one ulp; rounded from float64 it is the IEEE one.
    root = moment2.double().sqrt().float()
    denominator = (root / o.correction2 if slot.kind == "float32" else root * o.inverse2) + o.eps
    value = param.float() if slot.master is None else slot.master
    value = value * o.decay + o.step_size * moment1 / denominator
    if slot.master is not None:
        slot.master.copy_(value)
    elif param.dtype == torch.bfloat16:
        value = round_stochastically(value, slot.first, key)
    param.copy_(value)
    if not slot.param.is_contiguous():
        slot.param.copy_(whole.view(slot.param.shape))
    _encode(slot, moment1, moment2)


def round_stochastically(x: torch.Tensor, first: int, key: Sequence[int]) -> torch.Tensor:
    """float32 [n] -> bfloat16 [n], up with the probability of the fraction that is cut off.

    Args:
        x: what to round; numbers that are not finite, or would become so, are cut.
        first: what element 0 is called where random numbers are drawn.
        key: two numbers below 2**32.
    """
    index = torch.arange(first, first + x.numel(), device=x.device)
    # int64 holds a product of 32-bit numbers only modulo 2**64, which the mask makes right.
    noise = ((index * 0x9E3779B1) & _MASK) ^ key[0]
    noise = ((noise ^ (noise >> 16)) * 0x7FEB352D) & _MASK
    noise = ((noise ^ (noise >> 15) ^ key[1]) * 0x846CA68B) & _MASK
    bits = x.view(torch.int32).long() & _MASK
    held = (bits & 0x7FFFFFFF) >= 0x7F7F0000
    rounded = (bits + (noise >> 16).masked_fill(held, 0)) >> 16
    return (rounded - ((rounded & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double() + c.double()).float()


def _range(grad: torch.Tensor, slot: Slot) -> torch.Tensor:
    return grad.detach().reshape(-1)[slot.first : slot.first + slot.count]


def _decode(slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
    if slot.kind == "float32":
        return slot.moment1.view(-1), slot.moment2.view(-1)
    assert slot.scale1 is not None and slot.scale2 is not None
    book1, book2, block = _books(slot)
    moment1 = dequantize(slot.moment1.view(-1), slot.scale1, book1, block, slot.count, torch.float32)
    if slot.columns is None:
        return moment1, dequantize(slot.moment2.view(-1), slot.scale2, book2, block, slot.count, torch.float32)
    values = book2.table(slot.moment2.device)[unpack(slot.moment2, 4, slot.count).long()]
    return moment1, values * torch.minimum(slot.scale2[:, None], slot.columns).view(-1)


def _encode(slot: Slot, moment1: torch.Tensor, moment2: torch.Tensor) -> None:
    if slot.kind == "float32":
        slot.moment1.copy_(moment1.view_as(slot.moment1))
        slot.moment2.copy_(moment2.view_as(slot.moment2))
        return
    assert slot.scale1 is not None and slot.scale2 is not None
    book1, book2, block = _books(slot)
    if slot.kind == "8bit":
        for moment, book, codes, scales in (
            (moment1, book1, slot.moment1, slot.scale1),
            (moment2, book2, slot.moment2, slot.scale2),
        ):
            new_codes, new_scales = quantize(moment, book, block)
            codes.copy_(new_codes.view_as(codes))
            scales.copy_(new_scales)
        return
    slot.scale1.copy_(_block_maxima(moment1))
    slot.moment1.copy_(_nearest4(moment1, _spread(slot.scale1, slot.count), book1))
    if slot.columns is None:
        slot.scale2.copy_(_block_maxima(moment2))
        scale = _spread(slot.scale2, slot.count)
    else:
        matrix = moment2.view(slot.scale2.numel(), slot.columns.numel())
        slot.scale2.copy_(matrix.amax(dim=1))
        slot.columns.copy_(matrix.amax(dim=0))
        scale = torch.minimum(slot.scale2[:, None], slot.columns).view(-1)
    slot.moment2.copy_(_nearest4(moment2, scale, book2))


def _books(slot: Slot) -> tuple[Codebook, Codebook, int]:
    if slot.kind == "8bit":
        return MOMENT1_8BIT, MOMENT2_8BIT, BLOCK_8BIT
    return MOMENT1_4BIT, MOMENT2_4BIT, BLOCK_4BIT


def _block_maxima(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.abs(), (0, -x.numel() % BLOCK_4BIT)).view(-1, BLOCK_4BIT).amax(dim=1)


def _spread(scales: torch.Tensor, count: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK_4BIT)[:count]


def _nearest4(x: torch.Tensor, scale: torch.Tensor, book: Codebook) -> torch.Tensor:
    """float32 [n] and its scales [n] -> packed codes; an odd count is padded with the code of zero or the lowest."""
    codes = torch.bucketize(x / scale.clamp(min=_TINY), book.thresholds(x.device), out_int32=True).to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7 if book is MOMENT1_4BIT else 0)
    return pack(codes, 4)
