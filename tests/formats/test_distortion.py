"""The five figures against their formulas in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfbyte.errors import ShapeError
from halfbyte.formats import Distortion
from halfbyte.formats.distortion import distortion


@pytest.mark.parametrize("shape", [(1,), (63,), (7, 3), (127, 129)])
def test_formulas(shape):
    a = torch.randn(shape)
    b = a + 0.1 * torch.randn(shape)
    found = distortion(a, b, bins=16)
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    mse = ((x - y) ** 2).mean()
    p, q = (np.histogram(v, 16, (min(x.min(), y.min()), max(x.max(), y.max())))[0] + 0.5 for v in (x, y))
    p, q = p / p.sum(), q / q.sum()
    # Sums of up to 16 K float64 terms: 1e-9 leaves room for any order of adding.
    assert found.mse == pytest.approx(mse, rel=1e-9)
    assert found.sqnr_db == pytest.approx(10 * np.log10((x**2).mean() / mse), rel=1e-9)
    assert found.max_error == pytest.approx(np.abs(x - y).max(), rel=1e-9)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9, abs=1e-12)


def test_equal_tensors_are_at_distance_zero():
    w = torch.randn(65)
    found = distortion(w, w.clone())
    assert (found.mse, found.sqnr_db, found.max_error, found.kl) == (0.0, math.inf, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0, rel=1e-12)


def test_corners():
    zero = torch.zeros(3)
    assert distortion(torch.empty(0), torch.empty(0)) == Distortion(0.0, math.inf, 0.0, 1.0, 0.0)
    assert distortion(zero, zero) == Distortion(0.0, math.inf, 0.0, 1.0, 0.0)
    assert distortion(zero, torch.ones(3)).sqnr_db == -math.inf
    assert distortion(zero, torch.ones(3)).cosine == 0.0


def test_16_bit_tensors_are_summed_in_float64():
    """In float16 the sum of these squares would be infinite."""
    w = torch.full((70_000,), 60_000.0, dtype=torch.float16)
    assert distortion(w, w - 32).mse == 32.0**2


def test_chunks_add_up(monkeypatch):
    import importlib

    module = importlib.import_module("halfbyte.formats.distortion")
    a, b = torch.randn(1000), torch.randn(1000)
    whole = distortion(a, b)
    monkeypatch.setattr(module, "_CHUNK", 33)
    parts = distortion(a, b)
    assert parts.mse == pytest.approx(whole.mse, rel=1e-12) and parts.kl == pytest.approx(whole.kl, rel=1e-12)
    assert parts.max_error == whole.max_error


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match=r"\(3,\) and \(3, 1\)"):
        distortion(torch.ones(3), torch.ones(3, 1))
