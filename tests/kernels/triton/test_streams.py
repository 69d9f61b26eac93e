"""What only a card can show: streams, graphs, several devices, and that nothing waits."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte import nn

pytestmark = pytest.mark.gpu
ROWS = (1, 16, 64, 600)  # each way of a product


@pytest.fixture(autouse=True)
def _on_a_card_only(device):
    if device == "cpu":
        pytest.skip("the interpreter has no streams")


def weight_and_input(rows, device="cuda"):
    weight = hb.quantize(torch.randn(96, 128, device=device))
    return weight, torch.randn(rows, 128, device=device).bfloat16()


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_waits_for_its_own_stream(rows):
    """The input is written late there: a launch on another stream would read what was there before."""
    weight, x = weight_and_input(rows)
    wanted = torch.nn.functional.linear(x, weight)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = torch.nn.functional.linear(late, weight)
    side.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_captured_and_replayed(rows):
    weight, x = weight_and_input(rows)
    static = torch.zeros_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.nn.functional.linear(static, weight)  # compiles, which a capture could not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.nn.functional.linear(static, weight)
    static.copy_(x)
    graph.replay()
    assert torch.equal(found, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("rows", ROWS)
def test_the_current_device_may_be_another(rows):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one card")
    weight, x = weight_and_input(rows, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = torch.nn.functional.linear(x, weight)
    wanted = x.double() @ weight.dequantize(torch.bfloat16).double().t()
    assert found.device == x.device
    assert (found.double() - wanted).norm() <= 2**-8 * wanted.norm()


def test_nothing_waits_for_the_device():
    weight, x = weight_and_input(40)
    a, b = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((8, 128), (96, 8)))
    optimizer = hb.optim.AdamW([a, b], lr=1e-3, check_finite=False)

    def step():
        nn.lora_linear(x, hb.QuantizedTensor.packed(weight), None, a, b, 0.5).square().sum().backward()
        optimizer.step()
        weight.dequantize()

    step()  # compiles, and makes tables and states
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
