"""A quantized tensor's keys in a file: both layouts, there and back, and every way they can be damaged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte.errors import CheckpointError, FormatError, ShapeError
from halfbyte.tensor import flatten, is_state_key, read_spec, unflatten

NAME = "model.layers.0.up.weight"
ENCODINGS = [(f, s) for f in ("nf4", "fp4", "e2m1", "int4", "int8") for s in (None, 8, 6, 4)]


def state_key(flat: dict) -> str:
    return next(key for key in flat if ".quant_state." in key)


def edited(flat: dict, **changes) -> dict:
    """The same keys with an edited description; None takes an entry out."""
    key = state_key(flat)
    state = json.loads(bytes(flat[key].numpy())) | changes
    state = {name: value for name, value in state.items() if value is not None}
    return {**flat, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(("format", "scale_bits"), ENCODINGS)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 5, 21), (0, 4)])
def test_round_trip_in_halfbytes_layout(format, scale_bits, shape):
    q = hb.quantize(torch.randn(shape).bfloat16(), format, 32, scale_bits)
    assert unflatten(NAME, flatten(NAME, q, "halfbyte")).same_bytes(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "scale_bits"), [("nf4", None), ("nf4", 8), ("fp4", None), ("fp4", 8)])
def test_round_trip_in_bitsandbytes_layout(format, scale_bits, dtype):
    q = hb.quantize(torch.randn(7, 33, dtype=dtype), format, 64, scale_bits)
    flat = flatten(NAME, q)
    nested = {f"{NAME}.nested_absmax", f"{NAME}.nested_quant_map"} if scale_bits else set()
    state = f"{NAME}.quant_state.bitsandbytes__{format}"
    assert set(flat) == {NAME, f"{NAME}.absmax", f"{NAME}.quant_map", state} | nested
    assert flat[NAME].shape == (116, 1) and flat[NAME].dtype == torch.uint8
    keys = {"quant_type", "blocksize", "dtype", "shape"}
    keys |= {"nested_blocksize", "nested_dtype", "nested_offset"} if scale_bits else set()
    assert set(json.loads(bytes(flat[state].numpy()))) == keys  # bitsandbytes' loader rejects unknown ones
    assert unflatten(NAME, flat).same_bytes(q)
    assert read_spec(state, flat[state]) == q.spec


@pytest.mark.parametrize(("format", "scale_bits"), [("int4", 8), ("e2m1", None), ("nf4", 6), ("fp4", 4)])
def test_bitsandbytes_has_no_name_for_the_rest(format, scale_bits):
    q = hb.quantize(torch.randn(7, 33), format, 64, scale_bits)
    with pytest.raises(FormatError, match=f"{NAME} is {format} .* which bitsandbytes cannot read"):
        flatten(NAME, q)


def test_a_slice_inside_a_block_is_not_saved_by_itself():
    q = hb.quantize(torch.randn(8, 33), "nf4", 32)
    with pytest.raises(ShapeError, match="save the tensor it was cut from"):
        flatten(NAME, q[1:3])


def test_a_slice_of_whole_blocks_is():
    q = hb.quantize(torch.randn(8, 32), "nf4", 32, None)[0:3]
    assert torch.equal(unflatten(NAME, flatten(NAME, q)).dequantize(), q.dequantize())


def test_a_saved_4096_square_takes_4_127_bits(tmp_path):
    """MUST SHOW 4: bits counted from the file's bytes. What is not weights: two tables, the description, the header."""
    q = hb.quantize(torch.randn(4096, 4096), "nf4", 64, 8)
    save_file(flatten(NAME, q), tmp_path / "one.safetensors")
    on_disk = (tmp_path / "one.safetensors").stat().st_size
    flat = load_file(tmp_path / "one.safetensors")
    tables = 4 * 16 + 4 * 256 + flat[state_key(flat)].numel()
    header = 8 + int.from_bytes((tmp_path / "one.safetensors").read_bytes()[:8], "little")
    # The offset's four bytes are in the description.
    assert q.nbytes == on_disk - tables - header + 4
    assert f"{q.bits_per_weight:.3f}" == "4.127"
    assert f"{8 * on_disk / q.numel():.3f}" == "4.128"  # with all of the overhead: 0.9 KiB more
    assert unflatten(NAME, flat).same_bytes(q)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16])
def test_bytes_stored_under_another_dtype_are_the_same_bytes(storage):
    """bnb_4bit_quant_storage: FSDP shards them as floats."""
    q = hb.quantize(torch.randn(8, 64))
    flat = flatten(NAME, q)
    flat[NAME] = flat[NAME].view(-1).view(storage)[:, None]
    assert unflatten(NAME, flat).same_bytes(q)


def test_a_longer_name_beside_it_is_another_tensor():
    one, two = (hb.quantize(torch.randn(3, 32), format) for format in ("nf4", "fp4"))
    flat = flatten(NAME + "_2", two) | flatten(NAME, one)
    assert unflatten(NAME, flat).same_bytes(one)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a.weight.absmax", True), ("a.weight.quant_state.halfbyte__int4", True), ("a.weight", False), ("a.bias", False)],
)
def test_state_keys(key, expected):
    assert is_state_key(key) is expected


FLAT = "absmax", "nested_absmax", "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("missing", FLAT)
def test_a_missing_key_is_named(missing):
    flat = flatten(NAME, hb.quantize(torch.randn(7, 33)))
    del flat[f"{NAME}.{missing}"]
    with pytest.raises(CheckpointError, match=NAME) as caught:
        unflatten(NAME, flat)
    assert missing in str(caught.value) or "quant_state" in str(caught.value)


@pytest.mark.parametrize("short", ["", ".absmax", ".nested_absmax"])
def test_a_wrong_size_or_dtype_is_named(short):
    flat = flatten(NAME, hb.quantize(torch.randn(7, 33), "nf4", 32))
    for wrong in (flat[NAME + short][:-1], flat[NAME + short].to(torch.float64)):
        with pytest.raises(CheckpointError, match=f"{NAME}{short} holds .* its description asks for"):
            unflatten(NAME, {**flat, NAME + short: wrong})


@pytest.mark.parametrize("table", ["quant_map", "nested_quant_map"])
def test_a_custom_table_is_refused(table):
    """bitsandbytes' kernels ignore it, so the values would silently be others."""
    flat = flatten(NAME, hb.quantize(torch.randn(7, 33)))
    flat[f"{NAME}.{table}"][3] += 0.01
    with pytest.raises(CheckpointError, match=f"{NAME}.{table} is not the table"):
        unflatten(NAME, flat)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "complex64"},
        {"dtype": ["float32"]},
        {"dtype": None},
        {"shape": "7x33"},
        {"shape": [7, -33]},
        {"shape": [7, 34]},
        {"shape": [True, 33]},
        {"blocksize": 65},
        {"blocksize": "64"},
        {"quant_type": "nf5"},
        {"quant_type": {}},
        {"quant_type": "fp4"},
        {"nested_blocksize": 128},
        {"nested_offset": "much"},
        {"nested_offset": [1]},
        {"scale_bits": 5},
    ],
)
def test_a_damaged_description_is_one_sentence_with_the_name(changes):
    flat = edited(flatten(NAME, hb.quantize(torch.randn(7, 33))), **changes)
    with pytest.raises(CheckpointError, match=NAME) as caught:
        unflatten(NAME, flat)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1, 2]", b"", b"null"])
def test_a_description_that_is_no_json_object_is_told(text):
    flat = flatten(NAME, hb.quantize(torch.randn(7, 33)))
    flat[state_key(flat)] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=NAME):
        unflatten(NAME, flat)
