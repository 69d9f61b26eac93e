"""QuantizedTensor: a weight of any shape in half a byte an element, and its keys in files."""

from halfbyte.tensor.layout import LAYOUTS, flatten, is_state_key, read_shape, read_spec, unflatten
from halfbyte.tensor.quantized import QuantizedTensor, assemble, quantize

__all__ = [
    "LAYOUTS",
    "QuantizedTensor",
    "assemble",
    "flatten",
    "is_state_key",
    "quantize",
    "read_shape",
    "read_spec",
    "unflatten",
]
