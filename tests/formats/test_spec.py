"""A spec is validated once, and a mistake is told with the nearest choice."""

from __future__ import annotations

import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import BLOCK_SIZES, FORMATS, SCALE_BITS, QuantSpec


def test_all_offered_combinations_are_valid():
    specs = {QuantSpec(name, size, bits) for name in FORMATS for size in BLOCK_SIZES for bits in SCALE_BITS}
    assert len(specs) == len(FORMATS) * len(BLOCK_SIZES) * len(SCALE_BITS)
    assert sum(spec.interchange for spec in specs) == 2 * len(BLOCK_SIZES) * 2


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"format": "NF4"}, "'NF4' is not offered; .*'nf4'|choose one of: nf4"),
        ({"format": "int3"}, "did you mean 'int"),
        ({"format": None}, "choose one of: nf4, fp4"),
        ({"format": ["nf4"]}, "is not offered"),
        ({"block_size": 60}, "block size 60 is not offered; the nearest is 64"),
        ({"block_size": 48}, "the nearest is 32"),
        ({"block_size": 0}, "the nearest is 32"),
        ({"block_size": 10_000}, "the nearest is 4096"),
        ({"block_size": "64"}, "block size '64' is not offered; did you mean '64'"),
        ({"block_size": True}, "block size True is not offered"),
        ({"block_size": 64.0}, "block size 64.0 is not offered"),
        ({"scale_bits": 8.0}, "scale_bits 8.0 is not offered"),
        ({"scale_bits": 5}, "scale_bits 5 is not offered; choose one of: None, 8, 6, 4"),
        ({"scale_bits": 0}, "scale_bits 0 is not offered"),
    ],
)
def test_a_mistake_names_the_nearest_choice(options, hint):
    with pytest.raises(FormatError, match=hint) as caught:
        QuantSpec(**options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_spec_is_frozen():
    with pytest.raises(AttributeError):
        QuantSpec().block_size = 32  # type: ignore[misc]
