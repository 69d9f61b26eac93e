"""The numbers behind each code: one table per format, written once, for every backend.

A codebook maps a small integer (the *code*) to a value in [-1, 1]; a block of weights is stored as codes and one scale,
and a weight comes back as ``value[code] * scale``. What differs between formats is only where the values lie:

* **NF4** (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of a normal distribution with an exact zero.
  It is neither sixteen equal-probability bins nor k-means centres; `normal_float` derives it and a test compares.
* **FP4** as bitsandbytes defines it: sign, and the magnitudes {0, 1/16, 8, 12, 4, 6, 2, 3}/12 in that code order.
* **E2M1**: the OCP microscaling 4-bit float, {0, .5, 1, 1.5, 2, 3, 4, 6}/6. Not the same as FP4.
* **INT4**, **INT8**: symmetric, evenly spaced, zero at code 8 or 128: the baselines that the others are compared with.

Two decisions are fixed by files that already exist. First, the decision thresholds are the *float32* midpoints of
neighbouring values, and a tie goes to the lower value: that is what bitsandbytes computes on a CPU, and a threshold
that is one ulp off gives another code for some weight somewhere. Second, FP4 has two zeros, and bitsandbytes gives
the second one (code 8) to tiny positive values; we follow, so that codes are equal bit for bit. E2M1 is ours and
never writes its negative zero.

`csrc/tables.h` and the Triton kernels take these tables from here; nobody types them a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch

from halfbyte.errors import FormatError, nearest


@dataclass(frozen=True)
class Codebook:
    """One number format.

    Attributes:
        name: what users write: "nf4", "fp4", ...
        bits: bits a code takes, 4 or 8.
        values: the value of each code, `2**bits` floats in [-1, 1] (a code that is never written may lie outside).
        ascending: the codes the encoder may write, ordered by value. Thresholds lie between neighbours.
        interchange: whether bitsandbytes reads this format.
        keeps_positive: a value above zero is never coded as zero, however small: the first threshold is zero.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    ascending: tuple[int, ...] = field(default=())
    interchange: bool = False
    keeps_positive: bool = False

    def __post_init__(self) -> None:
        if not self.ascending:
            object.__setattr__(self, "ascending", tuple(range(len(self.values))))

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Values by code: float32 [2**bits]."""
        return _table(self.name, str(device))

    def thresholds(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Float32 midpoints between neighbouring values: [len(ascending) - 1]; `x > threshold` moves one code up."""
        return _thresholds(self.name, str(device))

    def codes(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Codes in ascending order of their values: uint8 [len(ascending)]."""
        return _ascending(self.name, str(device))


def normal_float(bits: int) -> tuple[float, ...]:
    """Quantiles of N(0, 1) with an exact zero, scaled to [-1, 1]; NF4's construction for any width.

    The offset that keeps the outermost quantiles finite is the mean of 1 - 1/(2n) and 1 - 1/(2(n-1)) for n = 2**bits;
    one value more is spent on the positive side. Source: QLoRA, appendix E; bitsandbytes `create_normal_map`.

    Returns:
        `2**bits` ascending floats, the first -1, the last 1.
    """
    n = 2**bits
    offset = ((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1)))) / 2
    quantiles = torch.special.ndtri
    positive = quantiles(torch.linspace(offset, 0.5, n // 2 + 1, dtype=torch.float64)[:-1])
    negative = -quantiles(torch.linspace(offset, 0.5, n // 2, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return tuple((values / values.max()).float().tolist())


def dynamic_map(*, signed: bool = True, decades: int = 7) -> tuple[float, ...]:
    """The dynamic map: `2**(decades + 1)` ascending floats whose spacing is fine near zero and coarse near one.

    Each decade has twice as many values as the one below it. With seven decades these are 8-bit codes: the largest
    decade has 64 values a sign, the signed map has 127 negatives, 0 and 128 positives, its minimum is -0.99297 and its
    maximum 1. QLoRA's text says that second-level scales are FP8; the published code, and every file, uses this table.
    With three decades they are the 4-bit "dynamic exponent" codes of arXiv 2309.01507.

    Source: "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2; bitsandbytes
    `create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for decade in range(decades):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        # The power is a Python float and the product is rounded once to float32: the order bitsandbytes' files have.
        means = 10 ** (decade - decades + 1) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return tuple(sorted(values))


def _signed(magnitudes: list[float]) -> tuple[float, ...]:
    return tuple(magnitudes) + tuple(-m for m in magnitudes)


# The published float32 constants; `normal_float(4)` agrees with them to 1.2e-7, and files agree with these.
NF4 = Codebook(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    interchange=True,
)
FP4 = Codebook(
    "fp4",
    4,
    _signed([m / 12 for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]),
    ascending=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
    interchange=True,
)
E2M1 = Codebook(
    "e2m1",
    4,
    _signed([m / 6 for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]),
    ascending=(15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7),
)
INT4 = Codebook("int4", 4, tuple((c - 8) / 7 for c in range(16)), ascending=tuple(range(1, 16)))
INT8 = Codebook("int8", 8, tuple((c - 128) / 127 for c in range(256)), ascending=tuple(range(1, 256)))

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4, E2M1, INT4, INT8)}
FORMATS = tuple(CODEBOOKS)

# Codes of optimizer states: the two moments of Adam in 8 bits (arXiv 2110.02861; bitsandbytes' qmap1 and qmap2) and in
# 4 bits (arXiv 2309.01507: a dynamic exponent for the first, evenly spaced without a zero for the second, so that an
# update is never divided by a second moment that was rounded to nothing). No weight is stored in them.
MOMENT1_8BIT = Codebook("moment1-8bit", 8, dynamic_map())
# Divided by, so that a small second moment that were stored as zero would leave only eps in the denominator.
MOMENT2_8BIT = Codebook("moment2-8bit", 8, dynamic_map(signed=False), keeps_positive=True)
MOMENT1_4BIT = Codebook("moment1-4bit", 4, dynamic_map(decades=3))
MOMENT2_4BIT = Codebook("moment2-4bit", 4, tuple((code + 1) / 16 for code in range(16)))
_ALL = {book.name: book for book in (*CODEBOOKS.values(), MOMENT1_8BIT, MOMENT2_8BIT, MOMENT1_4BIT, MOMENT2_4BIT)}


def get_codebook(name: str) -> Codebook:
    """The codebook called `name`.

    Raises:
        FormatError: no such format; the message names the nearest one.
    """
    try:
        return CODEBOOKS[name]
    except (KeyError, TypeError):
        raise FormatError(f"format {name!r} is not offered; {nearest(name, FORMATS)}") from None


@cache
def _table(name: str, device: str) -> torch.Tensor:
    return torch.tensor(_ALL[name].values, dtype=torch.float32, device=device)


@cache
def _thresholds(name: str, device: str) -> torch.Tensor:
    book = _ALL[name]
    values = _table(name, "cpu")[list(book.ascending)]
    midpoints = (values[:-1] + values[1:]) / 2
    if book.keeps_positive:
        midpoints[0] = 0.0
    return midpoints.to(device)


@cache
def _ascending(name: str, device: str) -> torch.Tensor:
    return torch.tensor(_ALL[name].ascending, dtype=torch.uint8, device=device)
