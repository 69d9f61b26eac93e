"""Plain JSON and tensors give back what was put in, whatever its nesting; the generators go on where they were."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from halfbyte.train.state import decode, encode, generators, set_generators


def there_and_back(value):
    plain, tensors = encode(value)
    return decode(json.loads(json.dumps(plain)), load(save(tensors)))


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
    ),
)


@given(nested)
def test_plain_values_come_back_with_their_types(value):
    got = there_and_back(value)
    assert got == value
    assert repr(got) == repr(value)  # 1, 1.0 and True are equal, and are not the same


def test_tensors_come_back_bit_for_bit():
    shared = torch.arange(6.0)
    values = {
        0: {
            "step": torch.tensor(3.0),
            "exp_avg": shared,
            "view": shared[2:],
            "same": shared,
            "empty": torch.zeros(0, 3),
        },
        "bf16": torch.tensor([1.5, math.inf], dtype=torch.bfloat16),
        "codes": torch.arange(256, dtype=torch.uint8).view(16, 16).T,
        "nan": math.nan,
    }
    got = there_and_back(values)
    assert list(got) == list(values)
    for name, tensor in values[0].items():
        assert torch.equal(got[0][name], tensor) and got[0][name].dtype == tensor.dtype
    assert torch.equal(got["bf16"], values["bf16"]) and torch.equal(got["codes"], values["codes"])
    assert math.isnan(got["nan"])


@pytest.mark.parametrize("kind", ["AdamW", "Adamax", "SGD", "Adafactor", "LBFGS"])
def test_an_optimizer_goes_on_where_it_was(kind):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 5)
        return layer, getattr(torch.optim, kind)(layer.parameters(), **({"momentum": 0.9} if kind == "SGD" else {}))

    def step(layer, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = layer(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    (layer, optimizer), (other, loaded) = make(), make()
    step(layer, optimizer)
    other.load_state_dict(layer.state_dict())
    loaded.load_state_dict(there_and_back(optimizer.state_dict()))
    step(layer, optimizer)
    step(other, loaded)
    assert torch.equal(layer.weight, other.weight)


def test_what_json_and_safetensors_cannot_hold_is_refused_by_its_path():
    for value, told in ((object(), "object"), (torch.nn.Linear(1, 1), "Linear"), (np.zeros(2), "ndarray")):
        with pytest.raises(TypeError, match=f"optimizer.state.3 is a {told}; a checkpoint holds tensors and plain"):
            encode({"state": {3: value}}, "optimizer")


def test_generators_go_on_where_they_were():
    states = there_and_back(generators())
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_generators(states)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn
