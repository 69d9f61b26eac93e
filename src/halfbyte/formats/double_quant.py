"""Double quantization: the scales are quantized too (QLoRA, section 3).

At block 64 a float32 scale costs half a bit a weight. Their mean over the whole tensor is taken off (scales are all
positive; without it half of a signed table would be wasted) and what remains is encoded blockwise, 256 scales a block.
The mean is *one number of the whole tensor*: a slice keeps its parent's, or its values change. On a CPU one thread sums
it, or the same weights would have other bytes on a machine with more cores, as they have with bitsandbytes.

With 8 bits the table is bitsandbytes' signed dynamic map and the result is bit-equal to its CPU code on one thread,
including how that finds the nearest entry: the normalised scale is first rounded to a grid of 65,536 points. With 6 and
4 bits the table is the normal-float construction of that width, which measured better than evenly spaced and dynamic
tables (relative squared error of the scales of N(0, 1) weights at block 64: 3.0e-4 against 5.2e-4 and 7.7e-4 at 4 bits;
docs/log.md).
"""

from __future__ import annotations

from functools import cache

import torch

from halfbyte.errors import FormatError
from halfbyte.formats.codebooks import dynamic_map, normal_float
from halfbyte.formats.packing import pack, packed_size, unpack
from halfbyte.formats.spec import SCALE_BITS, SCALE_BLOCK
from halfbyte.threads import one_thread

_GRID = 65535


def quantize_scales(scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a tensor's scales. The argument is not changed.

    Args:
        scales: float32 [n], finite.
        bits: 8, 6 or 4.

    Returns:
        codes: uint8 [packed_size(n, bits)].
        absmax: float32 [ceil(n / 256)], the second-level scales.
        offset: float32 [], the mean that was taken off.
    """
    count = scales.numel()
    offset = mean(scales)
    centred = torch.nn.functional.pad(scales - offset, (0, -count % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    absmax = centred.abs().amax(dim=1)
    # A block of equal scales has absmax 0 and 0 * inf; its codes do not matter, and bitsandbytes writes 0.
    x = (centred * (1.0 / absmax)[:, None]).clamp(-1, 1).nan_to_num(-1.0).view(-1)[:count]
    if bits == 8:
        grid = ((x + 1.0) * 0.5) * _GRID + 0.5
        return _grid_codes(str(scales.device))[grid.int()], absmax, offset
    table = scale_table(bits, scales.device)
    codes = torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return pack(codes, bits), absmax, offset


def mean(scales: torch.Tensor) -> torch.Tensor:
    """The offset of the scales of a tensor: float32 []; 0 where there are none."""
    if not scales.numel():
        return scales.new_zeros(())
    with one_thread():
        return scales.mean()


def dequantize_scales(
    codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor, bits: int, count: int, start: int = 0
) -> torch.Tensor:
    """Decode scales: ``table[code] * absmax + offset`` in float32.

    Args:
        codes: uint8, packed; its first code is the first of a second-level block.
        absmax: float32 [second-level blocks].
        offset: float32 [].
        bits: 8, 6 or 4.
        count: scales wanted.
        start: scales of the first block to leave out.

    Returns:
        float32 [count].
    """
    total = start + count
    index = unpack(codes[: packed_size(total, bits)], bits, total)
    values = scale_table(bits, codes.device)[index.int()]
    spread = absmax.repeat_interleave(SCALE_BLOCK)[:total]
    return (values * spread + offset)[start:]


def scale_table(bits: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The second level's values by code: float32 [2**bits], ascending.

    Raises:
        FormatError: the width is not offered.
    """
    return _scale_table(bits, str(device))


@cache
def _scale_table(bits: int, device: str) -> torch.Tensor:
    if bits not in SCALE_BITS:  # a table of 2**32 entries would be built for minutes
        raise FormatError(f"scales of {bits} bits are not offered; choose 8, 6 or 4")
    values = dynamic_map() if bits == 8 else normal_float(bits)
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _grid_codes(device: str) -> torch.Tensor:
    """The dynamic map's nearest code for each of the 65,536 grid points: uint8 [65536]."""
    table = _scale_table(8, "cpu")
    points = torch.arange(_GRID + 1, dtype=torch.float32) / _GRID * 2 - 1
    return torch.bucketize(points, (table[:-1] + table[1:]) / 2).to(torch.uint8).to(device)
