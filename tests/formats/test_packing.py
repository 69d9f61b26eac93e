"""Codes to bytes and back, for every width, any count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.formats.packing import gather, pack, packed_size, unpack


@st.composite
def packings(draw):
    bits = draw(st.sampled_from([4, 6, 8]))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), draw(st.integers(0, 2**bits - 1))


@given(packings())
@settings(deadline=None, max_examples=150)
def test_round_trip(case):
    bits, values, pad = case
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack(codes, bits, pad)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_size(len(values), bits)
    assert torch.equal(unpack(packed, bits, len(values)), codes)
    if bits != 8 and values:  # what fills the last byte is the pad code, bit for bit
        filled = unpack(packed, bits, packed.numel() * 8 // bits)
        assert (filled[len(values) :] == pad).all()


@given(packings(), st.data())
@settings(deadline=None, max_examples=150)
def test_gather_is_unpack_and_index(case, data):
    bits, values, pad = case
    if not values:
        return
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=20)))
    codes = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(gather(pack(codes, bits, pad), bits, index), codes[index].int())


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [0x1, 0x2, 0xF], [0x12, 0xF0]),  # bitsandbytes' order: the earlier code is the high nibble
        (6, [0b000001, 0b000010, 0b000011, 0b111111], [0b00000100, 0b00100000, 0b11111111]),
        (8, [3, 200], [3, 200]),
    ],
)
def test_the_earlier_code_is_in_the_high_bits(bits, codes, expected):
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_gather_keeps_the_shape_of_the_index():
    packed = pack(torch.arange(12, dtype=torch.uint8), 6)
    assert torch.equal(gather(packed, 6, torch.tensor([[0, 11], [5, 7]])), torch.tensor([[0, 11], [5, 7]]).int())
