"""Numbers of a step that a device computes are those that the host computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import RequestError
from halfbyte.kernels import slots
from halfbyte.kernels.slots import device_keys, device_options, make_options, random_keys

SEEDS = st.integers(-(2**70), 2**70)
COUNTS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**20)), min_size=1, max_size=5)


@given(seed=SEEDS, pairs=COUNTS)
def test_keys(seed, pairs):
    steps, numbers = np.array(pairs, dtype=np.int64).T.copy()
    expected = random_keys(seed, steps, numbers)
    for dtype in (torch.int64, torch.float64):
        found = device_keys(seed, torch.from_numpy(steps).to(dtype), torch.from_numpy(numbers))
        assert np.array_equal(found.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e-3)])
def test_options(lr):
    steps = [1, 2, 17, 1000, 10**6]
    group = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    found = device_options(group, torch.tensor(steps, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    assert found.dtype == torch.float32
    expected = torch.tensor([make_options(group, step, 0.3) for step in steps], dtype=torch.float64)
    # Rounded to float32 once; where a power's last place decides between two, it may be the other.
    assert ((found - expected).abs() <= (0.5 + 1e-6) * torch.finfo(torch.float32).eps * expected.abs()).all()


def test_what_lasts_is_not_made_in_a_capture(monkeypatch):
    slots.refuse_capture(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    monkeypatch.setattr(slots, "is_capturing", lambda device: True)
    with pytest.raises(RequestError, match="step once before the capture"):
        slots.refuse_capture(torch.device("cpu"))
