"""The native CRC-32 is zlib's."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.kernels.cpu import Native, native_library
from halfbyte.models import checksum

NOISE = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)


@pytest.fixture
def functions():
    library = native_library()
    if not isinstance(library, Native):
        pytest.skip(library.reason)
    return library.functions


@given(
    begin=st.integers(0, 70),
    nbytes=st.one_of(st.integers(0, 300), st.integers(0, 65_000)),
    crc=st.integers(0, 2**32 - 1),
)
def test_any_length_place_and_beginning(begin, nbytes, crc):
    data = NOISE[begin : begin + nbytes]
    assert checksum.crc32(data.data, crc) == zlib.crc32(data.data, crc)
    library = native_library()
    if isinstance(library, Native):
        assert library.functions["hb_crc32"](crc, data.ctypes.data, data.nbytes) == zlib.crc32(data.data, crc)


@pytest.mark.parametrize("byte", [0, 255])
def test_runs_of_one_byte(functions, byte):
    data = np.full(100_001, byte, np.uint8)
    assert functions["hb_crc32"](0, data.ctypes.data, data.nbytes) == zlib.crc32(data)


def test_in_parts_as_in_one(functions):
    crc = 0
    for start in range(0, len(NOISE), 9_999):
        crc = checksum.crc32(NOISE[start : start + 9_999].tobytes(), crc)
    assert crc == zlib.crc32(NOISE)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(checksum, "native_library", lambda: None)
    assert checksum.crc32(NOISE.tobytes(), 5) == zlib.crc32(NOISE, 5)
