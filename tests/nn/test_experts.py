"""Routing, and products by expert: every step equals indexing written out, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import ShapeError
from halfbyte.nn import GroupedLora, combine, dispatch, grouped_linear, grouped_lora, pieces, route
from halfbyte.nn import experts as experts_module
from halfbyte.nn.experts import _by_group, _by_grouped_mm, _dense

EXPERTS, TOP_K = 5, 3


def choices(tokens: int, experts: int = EXPERTS) -> torch.Tensor:
    return torch.rand(tokens, experts).argsort(1)[:, :TOP_K].contiguous()


@given(st.integers(0, 20), st.integers(3, 9))
@settings(max_examples=40, deadline=None)
def test_a_routing_is_a_sorted_permutation(tokens, experts):
    torch.manual_seed(0)
    index = choices(tokens, experts)
    routing = route(index, experts)
    assert routing.ends.dtype == torch.int32
    assert torch.equal(index.view(-1)[routing.order], routing.expert)
    assert torch.equal(routing.order[routing.place.view(-1)], torch.arange(tokens * TOP_K))
    x = torch.randn(tokens, 4)
    assert torch.allclose(combine(dispatch(x, routing), routing), TOP_K * x)
    assert torch.equal(routing.ends.diff(prepend=torch.zeros(1)), index.view(-1).bincount(minlength=experts).float())
    first = 0
    for expert, last in enumerate(routing.ends.tolist()):
        assert (routing.expert[first:last] == expert).all()
        assert (routing.order[first:last].diff() > 0).all()  # the order of the tokens is kept
        first = last


@given(st.integers(0, 30), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_pieces_are_cut_between_experts(tokens, rows, elsewhere):
    torch.manual_seed(0)
    index = choices(tokens)
    if elsewhere:
        index[::2, 0] = EXPERTS
    routing = route(index, EXPERTS)
    made = list(pieces(routing, rows))
    assert torch.equal(torch.cat([routing.order[:0], *(part.order for _, part in made)]), routing.order)
    x, weight = torch.randn(tokens * TOP_K, 12), torch.randn(EXPERTS, 7, 12)
    whole = grouped_linear(x, weight, routing)
    for number, (where, part) in enumerate(made):
        assert torch.equal(grouped_linear(x[where], weight, part), whole[where])
        inside = routing.ends[(routing.ends > where.start) & (routing.ends < where.stop)]
        assert len(part.order) >= rows or number == len(made) - 1  # large enough, but for the last
        assert not len(inside) or int(inside.max()) - where.start < rows  # and no larger than it has to be


def test_experts_that_live_elsewhere_come_last_and_give_nothing():
    """What transformers' expert parallelism marks with the number of experts."""
    index = torch.tensor([[0, EXPERTS, 2], [EXPERTS, 1, EXPERTS]])
    routing = route(index, EXPERTS)
    assert routing.ends.tolist() == [1, 2, 3, 3, 3] and routing.expert.tolist()[3:] == [EXPERTS] * 3
    x = dispatch(torch.randn(2, 64), routing)
    for weight in (hb.quantize(torch.randn(EXPERTS, 7, 64)), torch.randn(EXPERTS, 7, 64)):
        y = grouped_linear(x, weight, routing)
        assert y[:3].all() and not y[3:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dispatch_and_combine_equal_indexing(dtype):
    index = choices(6)
    routing = route(index, EXPERTS)
    x = torch.randn(6, 4).to(dtype).requires_grad_()
    pairs = dispatch(x, routing)
    assert torch.equal(pairs, x[routing.order // TOP_K])
    y = torch.randn(6 * TOP_K, 4).to(dtype).requires_grad_()
    sums = combine(y, routing)
    exact = y.double()[routing.place.view(-1)].view(6, TOP_K, 4)
    # One rounding to the dtype after a float32 (or float64) sum.
    eps = max(torch.finfo(dtype).eps, 2.0**-52)
    assert sums.dtype == dtype and ((sums - exact.sum(1)).abs() <= eps * exact.abs().sum(1)).all()


def test_gradients_of_dispatch_and_combine():
    routing = route(choices(4), EXPERTS)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4 * TOP_K, 3, dtype=torch.float64, requires_grad=True)
    for function, value in ((dispatch, x), (combine, y)):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, routing), (value,))
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v, routing), (value,))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_each_row_is_multiplied_with_its_experts_matrix(packed, transposed):
    index = choices(7)
    routing = route(index, EXPERTS)
    dense = torch.randn(EXPERTS, *((33, 20) if transposed else (20, 33)))
    weight = hb.quantize(dense, "nf4", 32) if packed else dense.requires_grad_()
    x = torch.randn(7 * TOP_K, 33, requires_grad=True)
    y = grouped_linear(x, weight, routing, transposed=transposed)
    matrices = weight.dequantize() if packed else dense
    by_row = (matrices if transposed else matrices.transpose(1, 2))[routing.expert]
    exact = (x[:, None].double() @ by_row.double())[:, 0]
    # A float32 sum of 33 terms, and that of 20 on the way back.
    limit = 33 * 2.0**-23 * (x[:, None].abs().double() @ by_row.abs().double())[:, 0]
    assert ((y - exact).abs() <= limit).all()
    grad = torch.randn_like(y)
    y.backward(grad)
    back = (grad[:, None].double() @ by_row.double().transpose(1, 2))[:, 0]
    limit = 20 * 2.0**-23 * (grad[:, None].abs().double() @ by_row.abs().double().transpose(1, 2))[:, 0]
    assert ((x.grad - back).abs() <= limit).all()
    if not packed:  # an expert without rows has a gradient of zeros
        assert torch.equal(dense.grad.abs().sum((1, 2)).bool(), index.view(-1).bincount(minlength=EXPERTS).bool())


def test_autocast_decides_about_the_rows():
    routing, weight = route(choices(2), EXPERTS), hb.quantize(torch.randn(EXPERTS, 7, 64))
    x = torch.randn(2 * TOP_K, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, routing)
    assert y.dtype == torch.bfloat16 and torch.equal(y, grouped_linear(x.bfloat16(), weight, routing))


@pytest.mark.parametrize("shape", [(EXPERTS, 7, 65), (EXPERTS + 1, 7, 64), (7, 64)])
def test_a_weight_that_does_not_fit_is_refused(shape):
    with pytest.raises(ShapeError, match=r"cannot multiply \(6, 64\) by 5 experts of \("):
        grouped_linear(torch.randn(6, 64), torch.randn(shape), route(choices(2), EXPERTS))


@pytest.mark.parametrize("tokens", [1, 40], ids=["fewer rows than experts", "more"])
def test_an_adapter_of_each_expert(tokens):
    routing = route(choices(tokens), EXPERTS)
    x = torch.randn(tokens * TOP_K, 12, dtype=torch.float64, requires_grad=True)
    a = torch.randn(EXPERTS, 2, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, 2, EXPERTS, dtype=torch.float64, requires_grad=True)  # as peft keeps it
    found = grouped_lora(x, GroupedLora(a, b.permute(2, 0, 1), 0.5), routing)
    expected = torch.einsum("sk,srk,osr->so", x, a[routing.expert], b.permute(0, 2, 1)[:, routing.expert]) * 0.5
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, a, b), upstream)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (x, a, b), upstream), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tokens_are_kept_in_place_of_their_rows(elsewhere):
    """The same gradients, and nothing with a row of the width of x for each pair in what autograd keeps."""
    index = choices(40)
    if elsewhere:
        index[7:30, 1] = EXPERTS
    routing = route(index, EXPERTS)
    tokens = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    a = torch.randn(EXPERTS, 2, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(EXPERTS, 7, 2, dtype=torch.float64, requires_grad=True)
    upstream, results, kept = torch.randn(40 * TOP_K, 7, dtype=torch.float64), [], []
    for of_tokens in (None, tokens):
        saved = []
        x = dispatch(tokens, routing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            y = grouped_lora(x, GroupedLora(a, b, 0.5), routing, of_tokens)
        results.append((y, *torch.autograd.grad(y, (tokens, a, b), upstream)))
        kept.append(sum(t.numel() for t in saved if t.shape[-1] == 12 and t.dtype.is_floating_point))
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert theirs.any() and torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = int(routing.ends[-1])
    assert kept[0] >= pairs * 12 and kept[1] == tokens.numel() + a.numel()
    frozen = GroupedLora(a.detach(), b.detach(), 0.5)
    x = dispatch(tokens, routing)
    (alone,) = torch.autograd.grad(grouped_lora(x, frozen, routing, tokens), tokens, upstream)
    assert torch.equal(alone, results[1][1])


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_torchs_own_grouped_product_is_asked_rightly(monkeypatch):
    """What a GPU runs for bfloat16; rows without an expert come back from torch as they were."""
    index = choices(9)
    index[3:5] = EXPERTS
    routing = route(index, EXPERTS)
    x = torch.randn(9 * TOP_K, 16).bfloat16()
    for weight in (torch.randn(EXPERTS, 16, 8), torch.randn(8, 16, EXPERTS).permute(2, 1, 0)):
        weight = weight.bfloat16().requires_grad_()
        found, expected = _by_grouped_mm(x, weight, routing.ends), _dense(x, weight, routing.ends)
        # Sums of 16 exact products in float32, rounded once: the order may move the result by one last place.
        assert torch.allclose(found, expected, rtol=2.0**-7, atol=16 * 2.0**-23 * 16)
        assert not found[-6:].any()
        of_weight = torch.autograd.grad(found.square().sum(), weight)[0]
        assert torch.allclose(of_weight, torch.autograd.grad(expected.square().sum(), weight)[0], rtol=0.05, atol=0.5)
    grad = torch.randn(9 * TOP_K, 8).bfloat16()
    expected = _by_group(grad, x, routing.ends)
    monkeypatch.setattr(experts_module, "_has_grouped_mm", lambda *_: True)
    assert torch.allclose(_by_group(grad, x, routing.ends), expected, rtol=2.0**-7, atol=27 * 2.0**-23 * 16)
