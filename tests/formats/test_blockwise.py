"""Blockwise encoding against its definition: scale = largest magnitude, code = nearest value, ties go down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.formats import BLOCK_SIZES, FORMATS, distortion, get_codebook
from halfbyte.formats.blockwise import dequantize, quantize
from halfbyte.formats.packing import unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMAT_OF = st.sampled_from(FORMATS)


@st.composite
def weights(draw):
    """A tensor with an odd count, any block size, heavy tails and a few zeros; float16 holds it too."""
    count = draw(st.sampled_from([1, 2, 31, 63, 64, 65, 127, 300, 4097]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(count, generator=generator) * 10 ** draw(st.floats(-2, 2))
    w[torch.rand(count, generator=generator) < 0.1] = 0
    return w.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(BLOCK_SIZES))


def spread(scales: torch.Tensor, block: int, count: int) -> torch.Tensor:
    return scales.repeat_interleave(block)[:count]


@given(weights(), FORMAT_OF)
@settings(deadline=None, max_examples=120)
def test_error_is_at_most_half_the_largest_gap(case, name):
    w, block = case
    book = get_codebook(name)
    codes, scales = quantize(w, book, block)
    back = dequantize(codes, scales, book, block, w.numel(), torch.float32)
    gap = book.table()[list(book.ascending)].diff().max()
    # Half a gap by the choice of code; three float32 roundings (reciprocal, product, product) of numbers up to absmax.
    bound = spread(scales, block, w.numel()) * (gap / 2 + 3 * 2**-24)
    assert ((w.float() - back).abs() <= bound).all()


@given(weights(), FORMAT_OF)
@settings(deadline=None, max_examples=60)
def test_scales_are_the_largest_magnitudes(case, name):
    w, block = case
    _, scales = quantize(w, get_codebook(name), block)
    expected = torch.stack([part.float().abs().max() for part in w.split(block)])
    assert torch.equal(scales, expected.clamp(min=1e-38) if w.numel() % block else expected)


@given(weights(), FORMAT_OF)
@settings(deadline=None, max_examples=60)
def test_quantizing_what_was_decoded_changes_nothing(case, name):
    w, block = case
    book = get_codebook(name)
    codes, scales = quantize(w, book, block)
    decoded = dequantize(codes, scales, book, block, w.numel(), w.dtype)
    again, scales_again = quantize(decoded, book, block)
    assert torch.equal(scales, scales_again)
    # By value: FP4 has two zeros, and a decoded zero comes back as the first of them.
    assert torch.equal(dequantize(again, scales, book, block, w.numel(), w.dtype), decoded)
    if name != "fp4":
        assert torch.equal(again, codes)


@pytest.mark.parametrize("name", FORMATS)
def test_the_code_is_the_nearest_value(name):
    """A brute-force search over the table in float64 finds no better code, but for ties within rounding."""
    book = get_codebook(name)
    w = torch.randn(7, 65)
    codes, scales = quantize(w, book, 64)
    x = w.reshape(-1).double() / spread(scales, 64, w.numel()).double()
    values = book.table().double()[list(book.ascending)]
    best = (x[:, None] - values).abs().min(dim=1).values
    chosen = (x - book.table().double()[unpack(codes, book.bits, w.numel()).int()]).abs()
    assert (chosen - best).max() <= 2 * 2**-24  # x itself is known to two float32 roundings


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [32, 64])
def test_ties_go_to_the_lower_value(name, block):
    book = get_codebook(name)
    w = torch.zeros(block)
    w[0] = 1.0  # absmax 1: the normalised weights are the thresholds, exactly
    thresholds = book.thresholds()[: block - 1]
    w[1 : 1 + thresholds.numel()] = thresholds
    codes, _ = quantize(w, book, block)
    found = unpack(codes, book.bits, block)[1 : 1 + thresholds.numel()]
    assert torch.equal(found, book.codes()[: thresholds.numel()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64,), (65,), (7, 3), (127, 129)])
def test_zeros_decode_to_exact_zeros(name, dtype, shape):
    w = torch.zeros(shape, dtype=dtype)
    codes, scales = quantize(w, get_codebook(name), 64)
    assert (dequantize(codes, scales, get_codebook(name), 64, w.numel(), dtype) == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_block_between_others_stays_zero(name):
    w = torch.randn(5 * 64 + 3)
    w[64:128] = 0
    codes, scales = quantize(w, get_codebook(name), 64)
    back = dequantize(codes, scales, get_codebook(name), 64, w.numel(), torch.float32)
    assert scales[1] == 0 and (back[64:128] == 0).all() and (back[:64] != 0).any()


def test_strides_do_not_matter_and_the_argument_is_not_changed():
    base = torch.randn(30, 41, 3)
    book = get_codebook("nf4")
    for view in (base.permute(2, 0, 1), base[::2, 1:], base[..., 1]):
        before = view.clone()
        dense = view.contiguous()
        assert all(torch.equal(a, b) for a, b in zip(quantize(view, book, 64), quantize(dense, book, 64), strict=True))
        assert torch.equal(view, before)


def test_a_tensor_longer_than_a_chunk_is_encoded_like_its_pieces(monkeypatch):
    """The chunk is an implementation's business: neither codes nor values may depend on it."""
    from halfbyte.formats import blockwise

    w = torch.randn(10 * 64 + 17)
    book = get_codebook("nf4")
    whole = quantize(w, book, 64)
    monkeypatch.setattr(blockwise, "_CHUNK_CPU", 128)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(w, book, 64), strict=True))
    for start in (0, 5):
        pieces = dequantize(*whole, book, 64, w.numel() - start, torch.float32, start)
        monkeypatch.undo()
        assert torch.equal(pieces, dequantize(*whole, book, 64, w.numel() - start, torch.float32, start))
        monkeypatch.setattr(blockwise, "_CHUNK_CPU", 128)


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_tensor_has_no_bytes(name):
    codes, scales = quantize(torch.empty(0, 5), get_codebook(name), 64)
    assert codes.numel() == scales.numel() == 0
    assert dequantize(codes, scales, get_codebook(name), 64, 0, torch.float32).shape == (0,)


@pytest.mark.parametrize("count", [1, 63, 127])
def test_an_odd_count_is_padded_with_the_code_of_zero(count):
    for name, zero in (("nf4", 7), ("fp4", 0), ("e2m1", 0), ("int4", 8)):
        codes, _ = quantize(torch.randn(count), get_codebook(name), 64)
        assert codes[-1] & 15 == zero, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_rounds_once(dtype):
    """The product in float32, then one rounding: the float32 result, cast, is the 16-bit result."""
    book = get_codebook("nf4")
    codes, scales = quantize(torch.randn(1000), book, 64)
    exact = dequantize(codes, scales, book, 64, 1000, torch.float32)
    assert torch.equal(dequantize(codes, scales, book, 64, 1000, dtype), exact.to(dtype))


@pytest.mark.parametrize(
    ("name", "mse", "sqnr"), [("nf4", 0.008458, 20.7), ("int4", 0.011582, 19.4), ("fp4", 0.014872, 18.3)]
)
def test_reference_errors_on_normal_weights(name, mse, sqnr):
    """FORMATS' figures. Over 2^20 weights their spread is 0.15 % of the mean (20 seeds), so 1 % is six spreads."""
    w = torch.randn(1 << 20)
    codes, scales = quantize(w, get_codebook(name), 64)
    found = distortion(w, dequantize(codes, scales, get_codebook(name), 64, w.numel(), torch.float32))
    assert found.mse == pytest.approx(mse, rel=0.01)
    assert found.sqnr_db == pytest.approx(sqnr, abs=0.1)
