"""AdamW with `capturable=True`: its numbers on the device, and on a card in a CUDA graph.

Where the interpreter runs, the optimizer is told that the CPU were a card.
"""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import RequestError
from halfbyte.kernels.triton import adamw as kernel
from halfbyte.kernels.triton.adamw import TritonBatch
from halfbyte.optim import AdamW, adamw

from .conftest import INTERPRETED

SHAPES = ((255,), (7, 333), (17, 256), (4099,))
SETTINGS = [
    {"state": "8bit", "max_grad_norm": 0.5},
    {"state": "8bit", "bf16": "master", "check_finite": False},
    {"state": "float32", "betas": (0.4, 0.9)},
]
needs_a_card = pytest.mark.skipif(INTERPRETED, reason="a graph is a card's")


@pytest.fixture(autouse=True)
def _the_device_is_taken_for_a_card(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(adamw, "make_batch", TritonBatch)
        monkeypatch.setattr(adamw, "why_not_captured", lambda device: "")


def parameters(device, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def optimizer_of(params, **settings):
    groups = [{"params": params[:1], "lr": 3e-2}, {"params": params[1:], "weight_decay": 0.1}]
    return AdamW(groups, lr=1e-2, seed=5, **settings)


def gradients(step, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def give(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def tensors(params, optimizer):
    """Everything that a step changes, but for the count of steps."""
    found = [param.detach() for param in params]
    for param in params:
        found += [tensor for name, tensor in optimizer.state[param].items() if name != "step"]
    return found


def assert_close(one, other):
    """Numbers are rounded to float32 from float64s that may differ in the last place, so most are equal."""
    for x, y in zip(one, other, strict=True):
        if x.dtype == torch.uint8:
            assert (x.int() - y.int()).abs().max() <= 1 and (x != y).float().mean() <= 1e-2
        else:
            assert (x.float() - y.float()).abs().max() <= 2 * torch.finfo(x.dtype).eps * y.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_equals_one_with_the_hosts_numbers(device, dtype, settings):
    """One parameter has no gradient in the second step, which leaves its count behind."""
    both = [parameters(device, dtype) for _ in range(2)]
    made = [optimizer_of(params, capturable=number == 1, **settings) for number, params in enumerate(both)]
    for step in range(3):
        grads = gradients(step, device, dtype)
        if step == 1:
            grads[2] = None
        for params, optimizer in zip(both, made, strict=True):
            give(params, [None if grad is None else grad.clone() for grad in grads])
            optimizer.step()
    assert_close(tensors(both[1], made[1]), tensors(both[0], made[0]))
    for one, other in zip(both[1], both[0], strict=True):
        assert made[1].state[one]["step"].item() == made[0].state[other]["step"]
    if made[0].grad_norm is not None:
        assert float(made[1].grad_norm) == pytest.approx(made[0].grad_norm, rel=1e-12)


def test_a_gradient_that_is_not_finite_changes_nothing(device):
    params = parameters(device)
    optimizer = optimizer_of(params, state="8bit", capturable=True)
    for step, spoilt in enumerate((False, True, False)):
        grads = gradients(step, device)
        if spoilt:
            grads[1][0, 0] = float("inf")
        before = [tensor.clone() for tensor in tensors(params, optimizer)] if step else []
        give(params, grads)
        optimizer.step()
        assert bool(torch.isfinite(optimizer.grad_norm)) != spoilt
        if spoilt:
            assert all(map(torch.equal, before, tensors(params, optimizer)))
    assert [optimizer.state[param]["step"].item() for param in params] == [2.0] * len(params)


def test_a_state_dict_goes_on_with_either(device):
    params = parameters(device)
    optimizer = optimizer_of(params, state="8bit", capturable=True)
    give(params, gradients(0, device))
    optimizer.step()
    saved = optimizer.state_dict()
    for capturable in (False, True):
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        other = optimizer_of(others, state="8bit", capturable=capturable)
        other.load_state_dict(saved)
        give(others, gradients(1, device))
        other.step()
        assert other.state[others[0]]["step"] == 2


def test_a_table_knows_where_parameters_lie_now(device):
    """Whoever moves a parameter would have its old memory written to."""
    params = parameters(device)
    optimizer = optimizer_of(params, state="8bit", capturable=True)
    for step in range(2):
        give(params, gradients(step, device))
        optimizer.step()
        if step == 0:
            old, params[0].data = params[0].data, params[0].data.clone()
            kept = old.clone()
    assert torch.equal(old, kept) and not torch.equal(params[0].data, old)


def test_what_cannot_be_captured_is_refused(device, monkeypatch):
    params = parameters(device)
    with pytest.raises(RequestError, match="'8bit' or 'float32'"):
        optimizer_of(params, state="4bit", capturable=True)
    with pytest.raises(RequestError, match="choose it or capturable"):
        optimizer_of(params, paged="file", capturable=True)
    turned = [torch.nn.Parameter(torch.randn(70, 60, device=device).t())]
    turned[0].grad = torch.ones_like(turned[0])
    with pytest.raises(RequestError, match="strides"):
        AdamW(turned, capturable=True).step()
    for module in (adamw, kernel):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    give(params, gradients(0, device))
    with pytest.raises(RequestError, match="make it with capturable=True"):
        optimizer_of(params).step()


@needs_a_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replays_equal_steps(device, dtype, settings):
    """Forward, backward and step in one graph, whose gradients lie in its own memory; the learning rate follows."""
    both = [parameters(device, dtype) for _ in range(2)]
    inputs = [torch.zeros_like(param) for param in both[0]]

    def lr():
        return torch.tensor(1e-2, device=device, dtype=torch.float64)

    made = [AdamW(params, lr=lr(), seed=5, capturable=True, **settings) for params in both]

    def loss(params):
        return sum((param.float() * x.float()).sum() for param, x in zip(params, inputs, strict=True))

    def fill(step):
        for x, value in zip(inputs, gradients(step, device, dtype), strict=True):
            x.copy_(value)
        for optimizer in made:
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (step + 1))

    def call(params, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss(params).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(2):
            fill(step)
            for params, optimizer in zip(both, made, strict=True):
                call(params, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    made[1].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        call(both[1], made[1])
    for step in range(2, 5):
        fill(step)
        call(both[0], made[0])
        graph.replay()
    for one, other in zip(tensors(both[1], made[1]), tensors(both[0], made[0]), strict=True):
        assert torch.equal(one, other)
    assert made[1].state[both[1][0]]["step"].item() == 5


@needs_a_card
def test_the_host_never_waits(device):
    params = parameters(device)
    optimizer = optimizer_of(params, state="8bit", max_grad_norm=1.0, capturable=True)
    for step in range(2):
        give(params, gradients(step, device))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_a_card
def test_a_first_step_is_not_captured(device):
    params = parameters(device)
    give(params, gradients(0, device))
    optimizer = optimizer_of(params, capturable=True)
    with pytest.raises(RequestError, match="step once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
