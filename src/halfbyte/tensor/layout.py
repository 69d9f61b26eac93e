"""How a quantized tensor is named and typed in a safetensors file, both ways.

Two layouts, of one shape: a tensor called `<m>.weight` becomes

    <m>.weight                                uint8 [bytes, 1]    packed codes
    <m>.weight.absmax                         float32 [blocks], or uint8 when the scales are quantized too
    <m>.weight.quant_map                      float32 [2**bits]   the codebook
    <m>.weight.nested_absmax                  float32             only with quantized scales
    <m>.weight.nested_quant_map               float32 [2**scale_bits]
    <m>.weight.quant_state.<layout>__<format> uint8               JSON: format, block size, dtype, shape, ...

`bitsandbytes` is the interchange: nf4 and fp4 with float32 or 8-bit scales, exactly the keys and JSON that library
writes and reads (its loader rejects any key it does not know). `halfbyte` is the same for everything bitsandbytes has
no name for: other formats, 6- and 4-bit scales. A file with a codebook that is not the format's own is refused:
bitsandbytes' kernels would silently ignore it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.errors import CheckpointError, FormatError, ShapeError
from halfbyte.formats import SCALE_BLOCK, QuantSpec
from halfbyte.formats.double_quant import scale_table
from halfbyte.formats.packing import packed_size
from halfbyte.tensor.quantized import QuantizedTensor

LAYOUTS = ("bitsandbytes", "halfbyte")
_STATE_KEY = re.compile(r"\.quant_state\.(bitsandbytes|halfbyte)__(\w+)$")
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def is_state_key(key: str) -> bool:
    """Whether a key in a file belongs to a quantized tensor beside its codes (absmax, quant_map, quant_state, ...)."""
    return bool(_STATE_KEY.search(key)) or key.rsplit(".", 1)[-1] in _COMPANIONS


def flatten(name: str, tensor: QuantizedTensor, layout: str = "bitsandbytes") -> dict[str, torch.Tensor]:
    """The tensors that stand for `tensor` in a file.

    Args:
        name: the parameter's name, "<m>.weight".
        tensor: not a slice that begins inside a block.
        layout: "bitsandbytes" or "halfbyte".

    Raises:
        FormatError: bitsandbytes has no name for this encoding.
        ShapeError: a slice that cannot be stored by itself.
    """
    spec = tensor.spec
    if layout == "bitsandbytes" and not spec.interchange:
        raise FormatError(
            f"{name} is {spec.format} with scale_bits={spec.scale_bits}, which bitsandbytes cannot read; "
            "it reads nf4 and fp4 with scale_bits 8 or None"
        )
    if tensor.start or tensor.scale_start:
        raise ShapeError(f"{name} is a slice that begins inside a block; save the tensor it was cut from")
    state: dict[str, Any] = {
        "quant_type": spec.format,
        "blocksize": spec.block_size,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    flat = {
        name: tensor.codes[:, None],
        f"{name}.absmax": tensor.scales,
        f"{name}.quant_map": spec.codebook.table(),
    }
    if spec.scale_bits is not None:
        assert tensor.scale_absmax is not None and tensor.scale_offset is not None
        flat[f"{name}.nested_absmax"] = tensor.scale_absmax
        flat[f"{name}.nested_quant_map"] = scale_table(spec.scale_bits)
        state |= {
            "nested_blocksize": SCALE_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": tensor.scale_offset.item(),
        }
    if layout == "halfbyte":
        state["scale_bits"] = spec.scale_bits
    encoded = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    flat[f"{name}.quant_state.{layout}__{spec.format}"] = encoded
    # Clones: tables are shared between tensors, and safetensors refuses shared memory.
    return {key: value.detach().clone() for key, value in flat.items()}


def unflatten(name: str, flat: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """Put a tensor together from its keys in a file, checking every one.

    Args:
        name: the parameter's name, "<m>.weight".
        flat: at least the keys that belong to it.

    Raises:
        CheckpointError: a key is missing, or a size or value contradicts the description.
    """
    state_key = next((key for key in flat if _STATE_KEY.search(key) and _STATE_KEY.sub("", key) == name), None)
    if state_key is None:
        raise CheckpointError(f"{name} has packed weights and no quant_state, so its format is unknown")
    state = _read_state(state_key, flat[state_key])
    spec, shape = _read_spec(name, state), tuple(state["shape"])
    count = torch.Size(shape).numel()
    blocks = -(-count // spec.block_size)
    codes = _take(flat, name, torch.uint8, packed_size(count, spec.codebook.bits))
    _check_table(flat, f"{name}.quant_map", spec.codebook.table())
    inner: dict[str, torch.Tensor | None] = {"codes": codes}
    if spec.scale_bits is None:
        inner["scales"] = _take(flat, f"{name}.absmax", torch.float32, blocks)
    else:
        inner["scales"] = _take(flat, f"{name}.absmax", torch.uint8, packed_size(blocks, spec.scale_bits))
        inner["scale_absmax"] = _take(flat, f"{name}.nested_absmax", torch.float32, -(-blocks // SCALE_BLOCK))
        _check_table(flat, f"{name}.nested_quant_map", scale_table(spec.scale_bits))
        inner["scale_offset"] = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=codes.device)
    return QuantizedTensor(inner, spec, shape, _DTYPES[state["dtype"]])


def read_spec(key: str, state: torch.Tensor) -> QuantSpec:
    """The encoding that a `quant_state` entry describes.

    Args:
        key: its key, "<m>.weight.quant_state.<layout>__<format>".
        state: its bytes, uint8.

    Raises:
        CheckpointError: it is damaged, or describes something that is not offered.
    """
    return _read_spec(_STATE_KEY.sub("", key), _read_state(key, state))


def read_shape(key: str, state: torch.Tensor) -> tuple[int, ...]:
    """The shape of the weight that a `quant_state` entry describes; arguments and errors as for `read_spec`."""
    return tuple(_read_state(key, state)["shape"])


def _read_state(key: str, tensor: torch.Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.cpu().numpy()))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{key} is not the JSON it should be: {error}") from None
    needed = {"quant_type", "blocksize", "dtype", "shape"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise CheckpointError(f"{key} lacks one of {', '.join(sorted(needed))}")
    if not isinstance(state["dtype"], str) or state["dtype"] not in _DTYPES:
        raise CheckpointError(f"{key} says dtype {state['dtype']!r}; halfbyte reads {', '.join(_DTYPES)}")
    shape = state["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise CheckpointError(f"{key} says shape {shape!r}, which is not a list of sizes")
    return state


def _read_spec(name: str, state: Mapping[str, Any]) -> QuantSpec:
    nested = "nested_offset" in state
    if nested and state.get("nested_blocksize") != SCALE_BLOCK:
        raise CheckpointError(f"{name} has second-level blocks of {state.get('nested_blocksize')}, not {SCALE_BLOCK}")
    if nested and not isinstance(state["nested_offset"], (int, float)):
        raise CheckpointError(f"{name} has the second-level offset {state['nested_offset']!r}, which is not a number")
    try:
        return QuantSpec(state["quant_type"], state["blocksize"], state.get("scale_bits", 8) if nested else None)
    except FormatError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _take(flat: Mapping[str, torch.Tensor], key: str, dtype: torch.dtype, size: int) -> torch.Tensor:
    if key not in flat:
        raise CheckpointError(f"{key} is missing from the checkpoint")
    tensor = flat[key].reshape(-1)
    if tensor.dtype != dtype and key.endswith("weight") and tensor.element_size() * tensor.numel() == size:
        # bnb_4bit_quant_storage: the same bytes under another name, so that FSDP can shard them.
        tensor = tensor.view(torch.uint8)
    if tensor.dtype != dtype or tensor.numel() != size:
        raise CheckpointError(
            f"{key} holds {tensor.numel()} x {tensor.dtype}, and its description asks for {size} x {dtype}"
        )
    return tensor


def _check_table(flat: Mapping[str, torch.Tensor], key: str, expected: torch.Tensor) -> None:
    table = flat.get(key)
    if table is not None and not torch.allclose(table.reshape(-1).float().cpu(), expected, rtol=0, atol=1e-6):
        raise CheckpointError(f"{key} is not the table of its format; a custom table is not read by any kernel")
