"""The fused LoRA product against the same thing written out, and what it keeps for its backward."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.nn import lora_linear

SHAPES = [((3,), 37, 5), ((2, 7), 64, 33), ((1, 1), 65, 64), ((0,), 64, 8)]


def written_out(x, q, bias, a, b, scaling):
    w = q.dequantize(x.dtype)
    y = x @ w.t() + (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t() * scaling
    return y if bias is None else y + bias.to(x.dtype)


def arguments(lead, k, n, rank, dtype, bias=True):
    x = torch.randn(*lead, k, dtype=dtype, requires_grad=True)
    q = hb.quantize(torch.randn(n, k), block_size=32)
    c = torch.randn(n, dtype=dtype, requires_grad=True) if bias else None
    masters = torch.promote_types(dtype, torch.float32)
    a, b = (torch.randn(*shape, dtype=masters, requires_grad=True) for shape in ((rank, k), (n, rank)))
    return x, q, c, a, b


@pytest.mark.parametrize("rank", [1, 7, 8, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("lead", "k", "n"), SHAPES)
def test_values_and_gradients_are_those_of_the_formula(lead, k, n, bias, rank):
    """In float64 on the reference, to rounding: sums of at most 65 + 64 products of numbers of size one."""
    x, q, c, a, b = arguments(lead, k, n, rank, torch.float64, bias)
    y = lora_linear(x, q.packed(), c, a, b, 0.5)
    expected = written_out(x, q, c, a, b, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    grad = torch.randn_like(expected)
    wanted = [one for one in (x, c, a, b) if one is not None]
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    x, q, c, a, b = arguments((4,), 33, 5, 7, torch.float64, bias)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, q.packed(), c, a, b, 0.5), (x, a, b))


def test_dropout_is_on_the_branch_only_and_its_gradient_follows_the_mask():
    x, q, _, a, b = arguments((16,), 64, 8, 4, torch.float64, bias=False)
    torch.manual_seed(1)
    y = lora_linear(x, q.packed(), None, a, b, 2.0, dropout=0.25)
    torch.manual_seed(1)
    dropped = torch.native_dropout(x, 0.25, True)[0]
    assert 0 < (dropped == 0).double().mean() < 0.5
    w = q.dequantize(x.dtype)
    expected = x @ w.t() + (dropped @ a.t()) @ b.t() * 2.0
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    grad = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, a, b), grad), torch.autograd.grad(expected, (x, a, b), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_agrees_within_its_rounding(dtype):
    """Products of K = 128 terms; each result is rounded a few times to `dtype`, relative to the size of its sums."""
    x, q, c, a, b = arguments((5,), 128, 48, 8, dtype)
    exact = written_out(*(one.double() if one is not q else q for one in (x, q, c, a, b)), 0.5)
    size = x.abs().double() @ q.dequantize(torch.float64).abs().t()
    size = size + (x.abs().double() @ a.abs().double().t()) @ b.abs().double().t() * 0.5 + c.abs().double()
    error = (lora_linear(x, q.packed(), c, a, b, 0.5).double() - exact).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * size).all()


def test_what_is_kept_is_the_packed_weight_the_input_and_a_x():
    """Trap 10: nothing of the decoded weight's size, no copy of the input, no second output."""
    x, q, _, a, b = arguments((6,), 64, 96, 4, torch.float32, bias=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, q.packed(), None, a, b, 0.5)
    packed = {inner.data_ptr() for inner in q.inner_tensors.values()}
    floating = sorted(t.numel() for t in kept if t.data_ptr() not in packed)
    assert floating == sorted([x.numel(), 6 * 4, a.numel(), b.numel()])
    assert any(t.data_ptr() == x.data_ptr() for t in kept) and any(t.data_ptr() == q.codes.data_ptr() for t in kept)
