"""The fused LoRA product against the same thing written out, and what it keeps for its backward."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.nn import LoraWeights, lora_linear, lora_linears

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


# ----------------------------------------------------------------------------------- several layers that read one input
def group(lead, k, sizes, ranks, dtype, biases):
    """An input and layers of `sizes` outputs, with ranks, scalings and factors of their own."""
    x = torch.randn(*lead, k, dtype=dtype, requires_grad=True)
    layers = []
    for i, (n, rank, bias) in enumerate(zip(sizes, ranks, biases, strict=True)):
        _, q, c, a, b = arguments((), k, n, rank, dtype, bias)
        layers.append(LoraWeights(q.packed(), c, a, b, 0.5 + i))
    return x, layers


def trained(x, layers):
    return [x, *(t for layer in layers for t in (layer.bias, layer.a, layer.b) if t is not None)]


@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (8, 7, 64), (3, 1, 5)])
def test_a_group_is_its_layers(ranks, biases):
    """Values and gradients in float64, to rounding; each layer by itself is compared with the formula above."""
    x, layers = group((2, 7), 65, (33, 5, 64), ranks, torch.float64, biases)
    together, alone = lora_linears(x, layers), [lora_linear(x, *layer) for layer in layers]
    grads = [torch.randn_like(y) for y in alone]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
    wanted = trained(x, layers)
    for ours, theirs in zip(
        torch.autograd.grad(together, wanted, grads), torch.autograd.grad(alone, wanted, grads), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)


def test_gradcheck_of_a_group():
    x, layers = group((3,), 33, (5, 4), (2, 3), torch.float64, (True, False))
    weights = [layer.weight for layer in layers]

    def product(x, bias, *factors):
        pairs = zip(weights, (bias, None), factors[::2], factors[1::2], (0.5, 2.0), strict=True)
        return lora_linears(x, [LoraWeights(*one) for one in pairs])

    assert torch.autograd.gradcheck(product, tuple(trained(x, layers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_in_low_precision_agrees_with_its_layers(dtype):
    """Gradients of x: sums of 96 + 8 + 64 + 8 products, rounded to `dtype` at most once a member and once a branch."""
    x, layers = group((5,), 128, (96, 64), (8, 8), dtype, (False, True))
    together, alone = lora_linears(x, layers), [lora_linear(x, *layer) for layer in layers]
    grads = [torch.randn_like(y) for y in alone]
    wanted = trained(x, layers)
    for ours, theirs in zip(
        (*together, *torch.autograd.grad(together, wanted, grads)),
        (*alone, *torch.autograd.grad(alone, wanted, grads)),
        strict=True,
    ):
        scale = theirs.abs().max()
        assert ours.dtype == theirs.dtype and (ours - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("frozen", ["x", "a of one layer", "the adapter of one layer", "all adapters"])
def test_what_is_frozen_in_a_group_gets_no_gradient(frozen):
    x, layers = group((4,), 64, (8, 16), (2, 3), torch.float64, (True, True))
    off = {
        "x": [x],
        "a of one layer": [layers[1].a],
        "the adapter of one layer": [layers[0].a, layers[0].b],
        "all adapters": [t for layer in layers for t in (layer.a, layer.b)],
    }[frozen]
    for tensor in off:
        tensor.requires_grad_(False)
    kept = [one for one in trained(x, layers) if all(one is not other for other in off)]
    together, alone = lora_linears(x, layers), [lora_linear(x, *layer) for layer in layers]
    grads = [torch.randn_like(y) for y in alone]
    for ours, theirs in zip(
        torch.autograd.grad(together, kept, grads), torch.autograd.grad(alone, kept, grads), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
    sum(y.sum() for y in lora_linears(x, layers)).backward()
    assert all(one.grad is None for one in off) and all(one.grad is not None for one in kept)


def test_a_result_of_a_group_that_nobody_uses():
    x, layers = group((4,), 64, (8, 16, 5), (2, 3, 1), torch.float64, (True, False, False))
    wanted = [x, layers[1].a, layers[1].b]
    ours = torch.autograd.grad(lora_linears(x, layers)[1].sum(), wanted)
    theirs = torch.autograd.grad(lora_linear(x, *layers[1]).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_a_group_keeps_its_input_once():
    x, layers = group((6,), 64, (96, 80), (4, 2), torch.float32, (False, False))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linears(x, layers)
    packed = {t.data_ptr() for layer in layers for t in layer.weight[:4] if t is not None}
    floating = sorted(t.numel() for t in kept if t.data_ptr() not in packed)
    assert floating == sorted([x.numel(), 6 * (4 + 2), 64 * (4 + 2), 96 * 4, 80 * 2])


# -------------------------------------------------------------------------------------------------- without gradients
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_gradients_the_product_is_the_same(rows, dtype):
    x, q, c, a, b = arguments((rows,), 128, 48, 8, dtype)
    exact = written_out(*(one.double() if one is not q else q for one in (x, q, c, a, b)), 0.5)
    size = x.abs().double() @ q.dequantize(torch.float64).abs().t()
    size = size + (x.abs().double() @ a.abs().double().t()) @ b.abs().double().t() * 0.5 + c.abs().double()
    with torch.no_grad():
        y = lora_linear(x, q.packed(), c, a, b, 0.5)
    assert y.grad_fn is None and y.dtype == dtype
    # The reference of float64 decodes weights in float64 as `exact` does.
    assert ((y.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * size).all()
