"""Decoded weights equal the reference's, bit for bit, with every second level of scales."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import FormatError, ShapeError
from halfbyte.formats import FORMATS
from halfbyte.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expected(q, dtype, cast):
    packed = q.packed()
    if dtype != torch.bfloat16:
        return reference.OPS["dequantize"](*packed, list(q.shape), dtype)
    return cast(reference.OPS["dequantize"](*packed, list(q.shape), torch.float32), dtype)


# More than 256 scales, so that there are two of the second level; an odd count; tiles that are whole and that are not.
@pytest.mark.parametrize("scale_bits", [None, 8, 6, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_weights(ops, device, cast, format, scale_bits):
    for number, (shape, block_size) in enumerate((((1,), 64), ((277, 33), 32), ((64, 128), 64), ((3, 3000), 4096))):
        q = hb.quantize(torch.randn(shape), format, block_size, scale_bits).to(device)
        dtype = DTYPES[number % 3]
        found = ops["dequantize"](*q.packed(), list(shape), dtype)
        assert found.dtype == dtype and torch.equal(found, expected(q, dtype, cast)), (shape, block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_bits", [None, 8, 6])
def test_slices_begin_inside_blocks(ops, device, cast, scale_bits, dtype):
    q = hb.quantize(torch.randn(300, 33), "nf4", 32, scale_bits).to(device)
    for begin, end in ((1, 300), (263, 290), (299, 300), (7, 7)):
        part = q.rows(begin, end)
        found = ops["dequantize"](*part.packed(), list(part.shape), dtype)
        assert torch.equal(found, expected(part, dtype, cast)), (begin, end)


def test_float64_and_nothing_at_all(ops, device):
    q = hb.quantize(torch.randn(7, 33)).to(device)
    found = ops["dequantize"](*q.packed(), [7, 33], torch.float64)
    assert torch.equal(found, reference.OPS["dequantize"](*q.packed(), [7, 33], torch.float64))
    assert ops["dequantize"](*q.packed(), [0, 33], torch.float32).shape == (0, 33)


@pytest.mark.parametrize("scale_bits", [None, 8, 6, 4])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_rows(ops, device, cast, format, scale_bits):
    for columns in (31, 1030):
        q = hb.quantize(torch.randn(40, columns), format, 32, scale_bits).to(device).rows(1, 40)
        for rows in (torch.tensor([[0, 38, 5], [5, 5, 17]]), torch.tensor([38], dtype=torch.int32)):
            found = ops["dequantize_rows"](*q.packed(), columns, rows.to(device), torch.bfloat16)
            assert torch.equal(found, expected(q, torch.bfloat16, cast)[rows.to(device).long()]), columns
    assert ops["dequantize_rows"](*q.packed(), columns, rows[:0].to(device), torch.float32).shape == (0, columns)


@pytest.mark.parametrize("scale_bits", [None, 8])
def test_a_row_that_is_not_there_is_not_a_number(ops, device, scale_bits):
    """An ignored label, -100, must not be looked up as the hundredth row from the end, nor memory behind the table."""
    q = hb.quantize(torch.randn(37, 32), "nf4", 32, scale_bits).to(device)
    found = ops["dequantize_rows"](
        *q.packed(), 32, torch.tensor([-100, 3, -1, 37, 2**40], device=device), torch.float32
    )
    assert torch.equal(found.isnan().all(1).cpu(), torch.tensor([True, False, True, True, True]))
    assert found[1].isfinite().all()


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(ops, device, cast, format):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(48, 64, device=device)
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type=format, compress_statistics=True)
    nested = (state.absmax, state.state2.absmax, state.offset)
    found = ops["dequantize"](codes.view(-1), *nested, format, 64, 8, 0, 0, [48, 64], torch.float32)
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


def broken_weights():
    good = hb.quantize(torch.randn(8, 128)).packed()
    return {
        "codes too short": good._replace(codes=good.codes[:-1]),
        "codes of another dtype": good._replace(codes=good.codes.float()),
        "scales too short": good._replace(scales=good.scales[:-1]),
        "scales of another dtype": good._replace(scales=good.scales.float()),
        "no second level": good._replace(scale_absmax=None),
        "second level of another dtype": good._replace(scale_absmax=good.scale_absmax.double()),
        "empty offset": good._replace(scale_offset=torch.empty(0)),
        "another format": good._replace(format="nf5"),
        "another block size": good._replace(block_size=48),
        "another width of scales": good._replace(scale_bits=5),
        "negative start": good._replace(start=-1),
        "start past the end": good._replace(start=64),
        "scales start past the end": good._replace(scale_start=300),
    }


@pytest.mark.parametrize("name", broken_weights())
def test_broken_weights_are_refused(ops, device, name):
    weight = [field.to(device) if isinstance(field, torch.Tensor) else field for field in broken_weights()[name]]
    calls = (
        lambda: ops["dequantize"](*weight, [8, 128], torch.float32),
        lambda: ops["linear"](*weight, 8, torch.randn(2, 128, device=device), None),
        lambda: ops["linear_grad_input"](*weight, 128, torch.randn(2, 8, device=device)),
    )
    for call in calls:
        with pytest.raises((FormatError, ShapeError)):
            call()
