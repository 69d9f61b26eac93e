"""The chunked loss against torch's, in float64, float32 and bfloat16: value, gradients, ignored tokens, divisors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from halfbyte.nn import linear_cross_entropy
from halfbyte.nn.cross_entropy import CHUNK_ROWS, CHUNK_ROWS_LEAST, chunk_rows

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Two thirds of the rows count: 400 of 600 are a whole chunk and a part of one.
SHAPES = ((1, 1, 2), (5, 3, 7), (600, 17, 33), (386, 64, 130))


def make(rows, width, vocabulary, dtype):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    labels[::3] = -100
    if rows == 1:
        labels[0] = vocabulary - 1
    return hidden, weight, bias, labels


def exact(hidden, weight, bias, labels, divisor):
    """Loss and gradients in float64 from the same numbers."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = wide[0] @ wide[1].t() + wide[2]
    loss = cross_entropy(logits, labels, reduction="sum") / divisor
    return loss, torch.autograd.grad(loss, wide), logits.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", EPS)
def test_loss_and_gradients_are_torchs(shape, dtype):
    """Products are summed in float32 (or wider) and rounded once, so a logit is wrong by at most
    d = (eps + (width + 2) u) m, where u is the resolution of the sums and m = |h| |w| + |b|.

    A loss moves by at most twice its largest logit's error, and a share of softmax by a factor of at most e^(2 d). Its
    gradient is rounded to the dtype, goes through one more product of `vocabulary` or `rows` terms, and is rounded
    again there and when the divisor is applied.
    """
    rows, width, vocabulary = shape
    hidden, weight, bias, labels = make(*shape, dtype)
    count = int((labels != -100).sum())
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    wanted, wanted_gradients, _ = exact(hidden, weight, bias, labels, count)
    magnitude = (hidden.detach().abs().double() @ weight.detach().abs().double().t() + bias.detach().abs()).max().item()
    sums = min(EPS[dtype], 2.0**-24)
    logit_error = (EPS[dtype] + (width + 2) * sums) * magnitude
    # float32: the exponential is good to 2 units in the last place, its sum to another few.
    own = 8 * 2.0**-24
    assert loss.dtype == torch.float32
    assert abs(loss.item() - wanted.item()) <= 2 * logit_error + own * (abs(wanted.item()) + 1)
    share = 2 * logit_error + own + EPS[dtype]
    terms = max(vocabulary, rows) * sums + 2 * EPS[dtype]
    bounds = (weight.detach().abs().max().item() * 2, hidden.detach().abs().max().item() * rows, rows)
    for gradient, good, scale in zip(gradients, wanted_gradients, bounds, strict=True):
        assert gradient.shape == good.shape
        assert (gradient.double() - good).abs().max().item() <= (share + terms) * 2 * scale / count


def test_gradcheck():
    hidden, weight, bias, labels = make(9, 4, 6, torch.float64)

    def loss(*tensors):
        return linear_cross_entropy(tensors[0], tensors[1], labels, tensors[2]).double()

    # The loss itself is float32, so differences of it are good to about 1e-7 / (2 * step).
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), eps=1e-2, atol=1e-3)


def test_leading_dimensions_divisor_and_scale_of_the_gradient():
    hidden, weight, _, labels = make(12, 5, 11, torch.float32)
    flat = linear_cross_entropy(hidden, weight, labels)
    count = int((labels != -100).sum())
    folded = linear_cross_entropy(hidden.view(3, 4, 5), weight, labels.view(3, 4), num_items=torch.tensor(2 * count))
    assert folded.item() == pytest.approx(flat.item() / 2, rel=1e-6)
    once = torch.autograd.grad(flat, hidden, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(-3 * flat, hidden)[0], -3 * once)
    assert torch.equal(once[labels == -100], torch.zeros_like(once[labels == -100]))


def test_nothing_to_learn_from():
    hidden, weight, _, labels = make(4, 3, 5, torch.float32)
    none = torch.full_like(labels, -100)
    loss = linear_cross_entropy(hidden, weight, none, num_items=7)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()
    assert linear_cross_entropy(hidden, weight, none).isnan()  # as torch's mean over nothing


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight, _, labels = make(4, 3, 5, torch.float32)
    for wrong in (5, -1):
        labels[1] = wrong
        with pytest.raises(IndexError, match=f"label {wrong} is out of range for a vocabulary of 5"):
            linear_cross_entropy(hidden, weight, labels)


def test_not_finite_stays_not_finite():
    hidden, weight, _, labels = make(5, 3, 9, torch.float32)
    with torch.no_grad():
        hidden[1, 0] = float("nan")  # row 0 is ignored
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.isnan()


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, _, labels = make(40, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, labels)
    by_hand = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert rounded.item() == by_hand.item()
    gradient = torch.autograd.grad(rounded, hidden)[0]
    assert gradient.dtype == torch.float32


def test_a_frozen_head_gets_no_gradient_and_no_grad_computes_none():
    hidden, weight, _, labels = make(6, 3, 5, torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_chunks_shrink_with_the_vocabulary():
    assert chunk_rows(32_000, 2) == CHUNK_ROWS
    assert CHUNK_ROWS_LEAST < chunk_rows(128_000, 2) < CHUNK_ROWS
    assert chunk_rows(1 << 20, 4) == CHUNK_ROWS_LEAST


@pytest.mark.parametrize("shape", [(5, 3, 7), (600, 17, 33)])
def test_rows_stand_in_for_those_of_the_matrix(shape):
    """In float64: the loss is that of the matrix with these rows, and they alone have a gradient."""
    hidden, weight, bias, labels = make(*shape, torch.float64)
    index = [shape[2] - 1, 0]
    values = torch.randn(2, shape[1], dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels, bias, rows=(index, values))
    got = torch.autograd.grad(loss, (hidden, values, bias))
    whole = weight.detach().index_copy(0, torch.tensor(index), values)
    wanted = cross_entropy(hidden @ whole.t() + bias, labels)
    assert torch.allclose(loss.double(), wanted, rtol=2.0**-23)
    for one, other in zip(got, torch.autograd.grad(wanted, (hidden, values, bias)), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
    assert torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, rows=(index, values)), weight, allow_unused=True
    ) == (None,)
