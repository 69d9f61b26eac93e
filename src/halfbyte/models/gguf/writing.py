"""Writing a GGUF file: bounded memory, whole or not there, and what the number format loses, measured.

The gguf package writes the header and quantizes; the data is streamed here, a few rows at a time, because that package
wants every tensor whole. What is written is decoded again by the same package and compared with what went in, so the
loss that is reported is this file's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import RequestError, nearest
from halfbyte.models.saving import new_file

# Our name for a type -> the gguf package's name for a file of it (LlamaFileType).
TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
_HALF = torch.finfo(torch.float16).max
# The largest value of a type: its scale (and its offset) is float16, and the largest code multiplies it.
_LARGEST = {"f16": _HALF, "q8_0": 127 * _HALF, "q5_1": _HALF, "q5_0": 16 * _HALF, "q4_1": _HALF, "q4_0": 8 * _HALF}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        name: GGUF's.
        source: the name that a message about it gives.
        shape: rows first.
        type: one of `TYPES`.
        pieces: gives the values in float32, rows in order.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Written:
    """What a file holds and what was lost on the way.

    Attributes:
        path: the file.
        nbytes: its size.
        types: type -> number of tensors.
        loss: type -> root mean square of the rounding errors over that of the values; 0 for an exact one.
        notes: what somebody who uses the file should know, one sentence each.
    """

    path: Path
    nbytes: int
    types: dict[str, int]
    loss: dict[str, float]
    notes: list[str]


def package() -> Any:
    """The gguf package.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise RequestError("writing GGUF needs the gguf package; pip install 'halfbyte[gguf]'") from None
    return gguf


def check_type(name: str) -> str:
    """A type's name, checked.

    Raises:
        RequestError: it is not offered.
    """
    if name.lower() not in TYPES:
        raise RequestError(f"GGUF type {name!r} is not offered; {nearest(name.lower(), TYPES)}")
    return name.lower()


def type_for(shape: tuple[int, ...], wanted: str) -> str:
    """The type of a tensor in a file of type `wanted`: vectors are f32, rows that are not whole blocks f16."""
    if len(shape) < 2:
        return "f32"
    block, _ = package().GGML_QUANT_SIZES[_qtype(wanted)]
    return wanted if shape[-1] % block == 0 else "f16"


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: list[Tensor], notes: list[str]
) -> Written:
    """Write a file.

    Args:
        path: a new file.
        architecture: `general.architecture`.
        metadata: values by key; the type of a value is its Python type (int: uint32, float: float32).
        tensors: in the order of the file.
        notes: handed on to the result.

    Raises:
        OutputError: the file exists or cannot be written, or the disk is full; nothing is left behind.
        RequestError: a tensor does not fit the range of its type.
    """
    gguf = package()
    losses: dict[str, tuple[float, float]] = {}
    with new_file(path) as aside:
        writer = gguf.GGUFWriter(aside, architecture)
        for key, value in metadata.items():
            _add(gguf, writer, key, value)
        for tensor in tensors:
            # A dtype other than uint8 says that the shape counts elements, not bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, float, _nbytes(gguf, tensor), _qtype(tensor.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with aside.open("ab") as file:
            for tensor in tensors:
                _pad(file)
                for data, lost, power in _encoded(gguf, tensor):
                    file.write(data)
                    before = losses.get(tensor.type, (0.0, 0.0))
                    losses[tensor.type] = (before[0] + lost, before[1] + power)
            _pad(file)
    types = [tensor.type for tensor in tensors]
    return Written(
        path,
        path.stat().st_size,
        {name: types.count(name) for name in TYPES if name in types},
        {name: math.sqrt(lost / power) if power else 0.0 for name, (lost, power) in losses.items()},
        notes,
    )


def _encoded(gguf: Any, tensor: Tensor) -> Iterator[tuple[bytes, float, float]]:
    """The bytes of each piece, the sum of its squared errors, and of its squared values."""
    kind = _qtype(tensor.type)
    for piece in tensor.pieces():
        values = piece.contiguous().numpy()
        largest = abs(values).max() if values.size else 0.0
        if largest > _LARGEST.get(tensor.type, math.inf):
            raise RequestError(
                f"{tensor.source} holds values up to {largest:.3g}, beyond the range of {tensor.type}; take f32 or bf16"
            )
        stored = gguf.quants.quantize(values, kind)
        error = 0.0
        if tensor.type != "f32":
            difference = (gguf.quants.dequantize(stored, kind).reshape(values.shape) - values).ravel().astype("float64")
            error = float(difference @ difference)
        flat = values.ravel().astype("float64")
        yield stored.tobytes(), error, float(flat @ flat)


def _qtype(name: str) -> Any:
    return getattr(package().GGMLQuantizationType, name.upper())


def _nbytes(gguf: Any, tensor: Tensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[_qtype(tensor.type)]
    return math.prod(tensor.shape) // int(block) * int(size)


def _pad(file: Any) -> None:
    alignment = package().GGUF_DEFAULT_ALIGNMENT
    file.write(bytes(-file.tell() % alignment))


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}[
        type(value)
    ]
    writer.add_key_value(key, value, kind)
