"""The row-wise ops: the reference against autograd through torch's own operations, native kernels against both."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from halfbyte import nn as operations
from halfbyte.errors import ShapeError
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.cpu.library import Missing

OPS = torch.ops.halfbyte
NATIVE = cpu.native_library()
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDTHS = (1, 2, 3, 15, 17, 33, 64, 130, 1000, 5000)


@pytest.fixture(params=["reference", *(() if isinstance(NATIVE, Missing) else NATIVE.isas())])
def op(request):
    """Finds an op by name: the reference's, or that of each instruction set of this CPU in turn."""
    if request.param == "reference":
        yield reference.OPS.__getitem__
        return
    before = NATIVE.isa
    NATIVE.use(request.param)
    yield cpu.native_ops().table().__getitem__
    NATIVE.use(before)


def close(got, wanted, dtype, scale, terms=1):
    """Computed in float32 with `terms` roundings of numbers up to `scale`, rounded once to `dtype`.

    float16 has 2^-24 as its smallest step.
    """
    error = (got.double() - wanted).abs()
    limit = EPS[dtype] * wanted.abs() + (8 + terms) * 2.0**-24 * scale
    assert got.dtype == dtype
    assert (error <= limit + (2.0**-24 if dtype == torch.float16 else 0)).all(), (error / limit).max().item()


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", EPS)
def test_rms_norm(op, n, dtype):
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in ((3, 5, n), (n,), (3, 5, n)))
    y, rstd = op("rms_norm")(x, weight, 1e-5)
    wide = x.double().requires_grad_()
    exact = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    close(y, exact.detach(), dtype, exact.abs().max().item())
    assert rstd.shape == (3, 5)
    got = op("rms_norm_grad")(grad, x, weight, rstd)
    size = (rstd[..., None] * (grad * weight).float()).abs()
    along = (
        rstd.double() ** 3
        * (grad.double() * weight.double() * wide).detach().abs().mean(-1)
        * x.double().abs().amax(-1)
    )
    close(got, exact_grad, dtype, size.max().item() + along.max().item(), terms=n**0.5)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", EPS)
def test_swiglu(op, n, dtype):
    gate, up, grad = ((torch.randn(n) * 4).to(dtype) for _ in range(3))
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    exact = silu(leaves[0]) * leaves[1]
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    close(op("swiglu")(gate, up), exact.detach(), dtype, exact.abs().max().item())
    for got, good in zip(op("swiglu_grad")(grad, gate, up), wanted, strict=True):
        close(got, good, dtype, (grad.abs() * up.abs()).max().item() + (grad * gate).abs().max().item())


def test_swiglu_at_the_ends(op):
    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])
    close(op("swiglu")(gate, torch.ones(7)), silu(gate.double()), torch.float32, 1.0)
    assert op("swiglu")(torch.tensor([float("nan")]), torch.ones(1)).isnan().all()


@pytest.mark.parametrize("batch_of_angles", [1, 2])
@pytest.mark.parametrize("dim", [2, 6, 34, 64, 128])
@pytest.mark.parametrize("dtype", EPS)
def test_rotary(op, dim, dtype, batch_of_angles):
    x, grad = (torch.randn(2, 7, 3, dim).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(batch_of_angles, 7, dim).to(dtype) for _ in range(2))
    wide = x.double().requires_grad_()
    first, second = wide.chunk(2, dim=-1)
    exact = wide * cos.double()[:, :, None] + torch.cat((-second, first), dim=-1) * sin.double()[:, :, None]
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    close(op("rotary")(x, cos, sin, False), exact.detach(), dtype, 8 * exact.abs().max().item())
    close(op("rotary")(grad, cos, sin, True), exact_grad, dtype, 8 * exact_grad.abs().max().item())


@pytest.mark.parametrize("vocabulary", WIDTHS)
@pytest.mark.parametrize("dtype", EPS)
def test_cross_entropy(op, vocabulary, dtype):
    logits = (torch.randn(6, vocabulary) * 5).to(dtype)
    labels = torch.randint(vocabulary, (6,))
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), wide)
    kept = logits.clone()
    losses = op("cross_entropy_")(logits, labels, False)
    assert torch.equal(logits, kept)
    # An exponent of up to `range` is rounded to float32 before e is raised to it.
    extent = (wide.amax(-1) - wide.amin(-1)).max().item() + 1
    close(losses, exact.detach(), torch.float32, extent, terms=8)
    assert torch.equal(op("cross_entropy_")(logits, labels, True), losses)
    close(logits, exact_grad, dtype, extent, terms=8)


def test_a_logit_that_is_not_finite_is_a_loss_that_is_not(op):
    for bad in (float("nan"), float("inf")):
        logits = torch.randn(2, 40)
        logits[1, 7] = bad
        losses = op("cross_entropy_")(logits, torch.tensor([0, 1]), False)
        assert losses[0].isfinite()
        assert not losses[1].isfinite()
    logits = torch.full((1, 40), float("-inf"))  # all words but one are forbidden
    logits[0, 3] = 2.0
    assert op("cross_entropy_")(logits, torch.tensor([3]), False).item() == pytest.approx(0.0, abs=1e-6)


def test_bad_arguments_are_refused(op):
    for label in (-100, 5):
        with pytest.raises(IndexError, match=f"label {label} is out of range"):
            op("cross_entropy_")(torch.randn(2, 5), torch.tensor([0, label]), True)


@pytest.mark.skipif(isinstance(NATIVE, Missing), reason="no native library")
def test_shapes_that_do_not_fit_are_refused():
    ops = cpu.native_ops()
    x = torch.randn(2, 6)
    for call in (
        lambda: ops.cross_entropy_(x, torch.zeros(3, dtype=torch.int64), False),
        lambda: ops.cross_entropy_(x, torch.zeros(2, dtype=torch.int32), False),
        lambda: ops.rms_norm(x, torch.ones(5), 1e-6),
        lambda: ops.rms_norm_grad(x[:1], x, torch.ones(6), torch.ones(2)),
        lambda: ops.rms_norm_grad(x, x, torch.ones(6), torch.ones(3)),
        lambda: ops.swiglu(x, x[:1]),
        lambda: ops.swiglu_grad(x, x, x[:, :3]),
        lambda: ops.rotary(torch.randn(1, 4, 2, 6), torch.randn(1, 3, 6), torch.randn(1, 3, 6), False),
        lambda: ops.rotary(torch.randn(1, 4, 2, 5), torch.randn(1, 4, 5), torch.randn(1, 4, 5), False),
    ):
        with pytest.raises(ShapeError):
            call()


def test_strided_empty_and_mixed_arguments():
    wide = torch.randn(4, 12)
    x, weight = wide[:, ::2], torch.randn(12)[::2]
    assert torch.allclose(OPS.rms_norm(x, weight, 1e-6)[0], OPS.rms_norm(x.contiguous(), weight.contiguous(), 1e-6)[0])
    assert torch.equal(OPS.swiglu(x, x), OPS.swiglu(x.contiguous(), x.contiguous()))
    assert OPS.swiglu(torch.empty(0), torch.empty(0)).numel() == 0
    assert OPS.cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), True).shape == (0,)
    logits = torch.randn(3, 20)
    view, labels = logits[:, ::2], torch.tensor([0, 9, 4])
    wanted = view.clone()
    OPS.cross_entropy_(wanted, labels, True)
    OPS.cross_entropy_(view, labels, True)
    assert torch.allclose(view, wanted, atol=1e-6)


def test_threads_change_nothing():
    logits, labels = torch.randn(67, 3000).bfloat16(), torch.randint(3000, (67,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = logits.clone()
        results.append((OPS.cross_entropy_(own, labels, True), own))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_the_functions():
    """Through autograd, in float64."""
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    heads = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    # rstd is kept in float32.
    assert torch.autograd.gradcheck(lambda x: operations.rms_norm(x, weight, 1e-3), x, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradcheck(operations.swiglu, (gate, up))
    assert torch.autograd.gradcheck(lambda x: operations.rotary(x, *angles), heads)
