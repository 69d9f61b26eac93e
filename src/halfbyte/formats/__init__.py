"""Number formats: tables, blockwise encoding, double quantization, packing, distortion. Numbers only, any device."""

from halfbyte.formats.codebooks import CODEBOOKS, FORMATS, Codebook, get_codebook
from halfbyte.formats.distortion import Distortion, distortion
from halfbyte.formats.spec import BLOCK_SIZES, SCALE_BITS, SCALE_BLOCK, QuantSpec

__all__ = [
    "BLOCK_SIZES",
    "CODEBOOKS",
    "FORMATS",
    "SCALE_BITS",
    "SCALE_BLOCK",
    "Codebook",
    "Distortion",
    "QuantSpec",
    "distortion",
    "get_codebook",
]
