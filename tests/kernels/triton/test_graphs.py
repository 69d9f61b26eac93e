"""On a card only: products and a layer of experts in a CUDA graph, and no call for which the host waits.

A replayed graph runs no Python and allocates nothing, so what an op decides by reading the device, or copies to it,
cannot be captured at all; `set_sync_debug_mode` refuses the same without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import halfbyte as hb
from halfbyte.models.experts import experts_forward
from halfbyte.nn import GroupedLora, Routing, grouped_linear, grouped_lora, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
OPS = torch.ops.halfbyte
Calls = dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int]]]


def layer_of_experts(count: int, hidden: int, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> what a module of experts gives, for a router that is a product."""
    router = torch.randn(hidden, count, device="cuda").bfloat16()
    module = SimpleNamespace(
        num_experts=count,
        has_bias=False,
        is_transposed=False,
        gate_up_proj=hb.quantize(torch.randn(count, 2 * width, hidden, device="cuda").bfloat16()),
        down_proj=hb.quantize(torch.randn(count, hidden, width, device="cuda").bfloat16()),
    )

    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    module._apply_gate = gated

    def forward(x: torch.Tensor) -> torch.Tensor:
        shares, index = (x @ router).softmax(-1).topk(2)
        return experts_forward(module, x, index, shares)

    return forward


def calls() -> Calls:
    """Each with the shape of its input."""
    torch.manual_seed(0)
    q = hb.quantize(torch.randn(96, 128, device="cuda").bfloat16())
    experts = hb.quantize(torch.randn(8, 96, 128, device="cuda").bfloat16())
    adapter = GroupedLora(torch.randn(8, 4, 128, device="cuda"), torch.randn(8, 96, 4, device="cuda"), 0.5)

    def routed(x: torch.Tensor) -> Routing:
        return route((x[:, :1].abs() * 1000).long() % 8, 8)

    return {
        "one row": (lambda x: torch.nn.functional.linear(x, q), (1, 128)),
        "some rows": (lambda x: torch.nn.functional.linear(x, q), (16, 128)),
        "many rows": (lambda x: torch.nn.functional.linear(x, q), (300, 128)),
        "g W": (lambda g: OPS.linear_grad_input(*q.packed(), 128, g), (16, 96)),
        "rows by expert": (lambda x: grouped_linear(x, experts, routed(x)), (24, 128)),
        "g W by expert": (
            lambda g: OPS.grouped_linear_grad_input(*experts.packed(), 128, g, routed(g).ends),
            (24, 96),
        ),
        "adapters by expert": (lambda x: grouped_lora(x, adapter, routed(x)), (4, 128)),
        "experts, one token": (layer_of_experts(8, 128, 64), (1, 128)),
        "experts": (layer_of_experts(8, 128, 64), (40, 128)),
    }


NAMES = (
    "one row",
    "some rows",
    "many rows",
    "g W",
    "rows by expert",
    "g W by expert",
    "adapters by expert",
    "experts, one token",
    "experts",
)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_graph_gives_what_the_call_gives(name):
    """Also for a second input, of which the router chooses other experts."""
    call, shape = calls()[name]
    x = torch.randn(shape, device="cuda").bfloat16()
    other = torch.randn(shape, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [call(one).clone() for one in (x, other)]  # compiles the kernels, which a capture could not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    given = x.clone()
    with torch.cuda.graph(graph):
        result = call(given)
    for one, wanted in zip((x, other), expected, strict=True):
        given.copy_(one)
        graph.replay()
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_host_never_waits(name):
    call, shape = calls()[name]
    x = torch.randn(shape, device="cuda").bfloat16()
    call(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_call_has_its_name():
    assert tuple(calls()) == NAMES
