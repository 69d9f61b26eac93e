"""The tables against their definitions: scipy's normal quantiles, bitsandbytes' dynamic map, written-out grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from halfbyte.errors import FormatError
from halfbyte.formats import CODEBOOKS, FORMATS, get_codebook
from halfbyte.formats.codebooks import NF4, dynamic_map, normal_float


def quantile_table(bits: int) -> np.ndarray:
    """QLoRA, appendix E, in NumPy: the definition, not our construction."""
    n = 2**bits
    offset = ((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1)))) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, n // 2 + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, n // 2)[:-1])
    values = np.sort(np.concatenate([negative, [0.0], positive]))
    return values / values.max()


def test_nf4_is_the_table_of_normal_quantiles():
    # The published constants were computed in float32: 1.1e-7 off (FORMATS), so 2e-7 is their precision and no slack.
    assert np.abs(np.array(NF4.values) - quantile_table(4)).max() < 2e-7


@pytest.mark.parametrize("bits", [4, 6])
def test_normal_float_is_its_definition(bits):
    # One rounding to float32 of numbers up to 1: half an ulp is 6e-8.
    assert np.abs(np.array(normal_float(bits)) - quantile_table(bits)).max() <= 2**-24
    assert normal_float(bits)[0] == -1 and normal_float(bits)[-1] == 1 and 0.0 in normal_float(bits)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes_own(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(dynamic_map(signed=signed)), functional.create_dynamic_map(signed=signed))


def test_signed_dynamic_map_has_127_negatives_and_reaches_only_one_end():
    values = dynamic_map()
    assert (sum(v < 0 for v in values), sum(v > 0 for v in values), len(set(values))) == (127, 128, 256)
    assert max(values) == 1.0 and min(values) == pytest.approx(-0.99297, abs=5e-6)


def test_fp4_and_e2m1_are_two_formats():
    fp4 = [m / 12 for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    e2m1 = [m / 6 for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    assert get_codebook("fp4").table().tolist() == pytest.approx(fp4 + [-v for v in fp4], rel=2**-24)
    assert get_codebook("e2m1").table().tolist() == pytest.approx(e2m1 + [-v for v in e2m1], rel=2**-24)


@pytest.mark.parametrize(("name", "zero", "top"), [("int4", 8, 7), ("int8", 128, 127)])
def test_integer_formats_are_even_and_symmetric(name, zero, top):
    book = get_codebook(name)
    used = book.table()[list(book.ascending)]
    assert book.values[zero] == 0 and torch.equal(used, -used.flip(0))
    assert torch.allclose(used.diff(), torch.tensor(1 / top), rtol=0, atol=2**-24)


@pytest.mark.parametrize("name", FORMATS)
def test_every_table_reaches_both_ends_and_holds_zero(name):
    """What the error bound and the exact zeros of blockwise encoding rest on."""
    used = CODEBOOKS[name].table()[list(CODEBOOKS[name].ascending)]
    assert used[0] == -1 and used[-1] == 1 and 0.0 in used
    assert (used.diff() >= 0).all()


def test_nf4_thresholds_are_the_documented_ones():
    """FORMATS lists the native code's; only the last differs from the float32 midpoint the CPU uses, by one ulp."""
    rows = [
        [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984],
        [-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668],
        [0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784178118011],
    ]
    documented = torch.tensor(rows).view(-1)
    ours = NF4.thresholds()
    assert torch.equal(ours[:-1], documented[:-1])
    assert 0 < ours[-1] - documented[-1] <= 2**-24


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(FormatError, match="'nf3' is not offered; did you mean 'nf4'"):
        get_codebook("nf3")
