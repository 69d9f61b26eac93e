"""What a quantized tensor is encoded as: format, block size, width of the scales. Validated once, here."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import FormatError, nearest
from halfbyte.formats.codebooks import Codebook, get_codebook

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BITS = (None, 8, 6, 4)
# Scales that share one second-level scale. bitsandbytes' files say 256, and nobody has measured a reason to differ.
SCALE_BLOCK = 256


@dataclass(frozen=True)
class QuantSpec:
    """The encoding of one tensor.

    Attributes:
        format: "nf4" (default), "fp4", "e2m1", "int4" or "int8".
        block_size: weights that share a scale, 32 to 4096 in powers of two. Blocks run over the flattened row-major
            tensor and the last may be partial.
        scale_bits: None keeps scales in float32; 8, 6 or 4 quantizes them a second time (double quantization, QLoRA
            section 3). 8 is what bitsandbytes reads.

    Raises:
        FormatError: a value is not offered; the message names the nearest that is.
    """

    format: str = "nf4"
    block_size: int = 64
    scale_bits: int | None = 8

    def __post_init__(self) -> None:
        get_codebook(self.format)
        # A file may say 64.0 or true, which are equal to a number that is offered and count no bytes.
        if self.block_size not in BLOCK_SIZES or type(self.block_size) is not int:
            raise FormatError(f"block size {self.block_size!r} is not offered; {_nearest_number(self.block_size)}")
        if self.scale_bits not in SCALE_BITS or isinstance(self.scale_bits, float):
            raise FormatError(f"scale_bits {self.scale_bits!r} is not offered; choose one of: None, 8, 6, 4")

    @property
    def codebook(self) -> Codebook:
        """The format's table."""
        return get_codebook(self.format)

    @property
    def interchange(self) -> bool:
        """Whether bitsandbytes reads this encoding."""
        return self.codebook.interchange and self.scale_bits in (None, 8)

    def nominal_bits(self) -> float:
        """Bits a weight takes in the limit of a large tensor; `QuantizedTensor.bits_per_weight` counts real bytes."""
        per_scale = 32.0 if self.scale_bits is None else self.scale_bits + 32 / SCALE_BLOCK
        return self.codebook.bits + per_scale / self.block_size


def _nearest_number(size: object) -> str:
    if isinstance(size, int) and not isinstance(size, bool):
        return f"the nearest is {min(BLOCK_SIZES, key=lambda offered: (abs(offered - size), offered))}"
    return nearest(str(size), map(str, BLOCK_SIZES))
