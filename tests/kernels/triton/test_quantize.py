"""Codes and scales equal the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import FormatError
from halfbyte.formats import FORMATS, get_codebook
from halfbyte.kernels import reference

# (shape, block): one weight, an odd count, rows that straddle blocks, several programs, a block of a whole program.
CASES = (((1,), 64), ((33,), 32), ((7, 33), 32), ((19, 111), 64), ((3, 3000), 4096))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(ops, w, format, block_size):
    found, expected = (table["quantize"](w, format, block_size) for table in (ops, reference.OPS))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), (w.shape, block_size)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_and_scales(ops, device, format):
    for number, (shape, block_size) in enumerate(CASES):
        check(ops, (torch.randn(shape) * 0.02).to(DTYPES[number % 4]).to(device), format, block_size)


@pytest.mark.parametrize("format", FORMATS)
def test_special_weights(ops, device, format):
    """Ties, zeros of both signs, subnormal blocks, whole and partial."""
    thresholds = get_codebook(format).thresholds()
    w = torch.zeros(9 * 64 + 33)
    w[: len(thresholds[:63])] = thresholds[:63]
    w[63] = 1.0
    w[64:128] = torch.randn(64) * 1e-41
    w[128:192] = -0.0
    w[-33:] = torch.randn(33) * 1e-39
    check(ops, w.to(device), format, 64)
    check(ops, torch.zeros(65, device=device), format, 64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_scale_alone(ops, device, value):
    for at, count in ((70, 256), (250, 256), (250, 251)):
        w = torch.randn(count)
        w[at] = value
        _, scales = ops["quantize"](w.to(device), "nf4", 64)
        assert (~scales.isfinite()).nonzero().squeeze().item() == at // 64


def test_strides_empty_and_wrong(ops, device):
    strided = torch.randn(66, 20, device=device).t()
    check(ops, strided, "nf4", 64)
    check(ops, torch.empty(0, device=device), "nf4", 64)
    with pytest.raises(FormatError):
        ops["quantize"](torch.ones(64, dtype=torch.int32, device=device), "nf4", 64)
    with pytest.raises(FormatError):
        ops["quantize"](torch.randn(64, device=device), "nf4", 48)
    with pytest.raises(FormatError):
        ops["quantize"](torch.randn(64, device=device), "nf5", 64)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(ops, device, format):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(48, 64, device=device)
    codes, scales = ops["quantize"](w, format, 64)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type=format)
    assert torch.equal(codes, theirs.view(-1)) and torch.equal(scales, state.absmax)
