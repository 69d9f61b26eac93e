"""Linear4bit: a frozen weight, a compute dtype of its own, storage that forward does not touch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import FormatError
from halfbyte.formats import QuantSpec


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 33), (7, 3), (65, 129)])
def test_it_multiplies_with_the_decoded_weight(rows, columns, bias):
    w, b = torch.randn(rows, columns), torch.randn(rows) if bias else None
    layer = hb.Linear4bit.from_weight(w, b, QuantSpec("nf4", 32))
    x = torch.randn(2, 3, columns)
    assert torch.equal(layer(x), nn.functional.linear(x, hb.quantize(w, "nf4", 32).dequantize(), b))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_the_compute_dtype_is_its_own_and_the_result_has_the_inputs(compute, given):
    layer = hb.Linear4bit.from_weight(torch.randn(5, 33), torch.randn(5), compute_dtype=compute)
    x = torch.randn(2, 33, dtype=given)
    y = layer(x)
    expected = nn.functional.linear(x.to(compute), layer.weight.dequantize(compute), layer.bias.to(compute))
    assert y.dtype == given and torch.equal(y, expected.to(given))


def test_forward_and_backward_change_no_byte():
    """Trap 22: a library repacks weights in forward and undoes it at save. Addresses are compared too."""
    layer = hb.Linear4bit.from_weight(torch.randn(40, 64), torch.randn(40))
    before = layer.weight.clone()
    addresses = {name: inner.data_ptr() for name, inner in layer.weight.inner_tensors.items()}
    weight = layer.weight
    for mode in (True, False):
        layer.train(mode)
        for rows in (1, 3):
            layer(torch.randn(rows, 64, requires_grad=True)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(1, 64))
    assert layer.weight is weight and weight.same_bytes(before)
    assert {name: inner.data_ptr() for name, inner in weight.inner_tensors.items()} == addresses


def test_a_layer_made_from_a_quantized_weight_keeps_its_bytes():
    q = hb.quantize(torch.randn(5, 33), "int8", 128, 4)
    layer = hb.Linear4bit.from_weight(q)
    assert layer.weight.same_bytes(q) and "int8, block_size=128" in repr(layer)


def test_a_new_layer_holds_no_memory_until_it_is_filled():
    layer = hb.Linear4bit(1 << 20, 1 << 20)
    assert layer.weight.is_meta and not layer.weight.requires_grad


def test_a_weight_with_nan_is_refused():
    with pytest.raises(FormatError, match="NaN or Inf"):
        hb.Linear4bit.from_weight(torch.full((3, 3), float("nan")))
