"""Products of rows sorted by expert: the reference is the plain loop, every instruction set equals single products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import ShapeError
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.cpu.library import Native

OPS = torch.ops.halfbyte
NATIVE = cpu.native_library()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
native = pytest.mark.skipif(not isinstance(NATIVE, Native), reason="there is no native library")
# (rows of an expert's matrix, columns, block, format, scale bits): one output, blocks of two tables, rows and experts
# that straddle blocks, a block that spans experts, 8-bit codes, more than one piece of work.
WEIGHTS = (
    (1, 64, 64, "nf4", 8),
    (37, 192, 32, "fp4", None),
    (9, 33, 32, "nf4", 8),
    (3, 64, 512, "nf4", 6),
    (5, 64, 64, "int8", 4),
    (130, 576, 64, "int4", 8),
)
# Rows of each expert: none first and last, one, as many as each kernel takes and one more, all of them with one expert.
ROUTINGS = ((0, 1, 40, 3, 0), (0, 0, 150), (2, 1, 1, 1, 17, 33, 32), (0, 0), (129,))


def ends_of(counts) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def plain(q, rows, ends, transposed=False):
    """The loop over experts, with the decoded weight."""
    weight = q.dequantize(rows.dtype)
    out = rows.new_zeros(len(rows), weight.shape[1 if not transposed else 2])
    first = 0
    for matrix, last in zip(weight, ends.tolist(), strict=True):
        out[first:last] = rows[first:last] @ (matrix if transposed else matrix.T)
        first = last
    return out


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_reference_is_the_plain_loop(dtype):
    for n, k, block_size, format, scale_bits in WEIGHTS:
        for counts in ROUTINGS:
            q = hb.quantize(torch.randn(len(counts), n, k), format, block_size, scale_bits)
            ends, rows = ends_of(counts), sum(counts) + 2  # two that belong to no expert
            x, grad = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
            y = reference.OPS["grouped_linear"](*q.packed(), n, x, ends)
            assert torch.equal(y, plain(q, x, ends)) and y.dtype == dtype
            back = reference.OPS["grouped_linear_grad_input"](*q.packed(), k, grad, ends)
            assert torch.equal(back, plain(q, grad, ends, transposed=True))


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_expert_gets_what_its_product_alone_gives(isa, dtype):
    """To the bit, and test_cpu.py bounds that product."""
    for n, k, block_size, format, scale_bits in WEIGHTS:
        for counts in ROUTINGS:
            q = hb.quantize(torch.randn(len(counts), n, k) / k**0.5, format, block_size, scale_bits)
            ends, rows = ends_of(counts), sum(counts) + 2
            x, grad = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
            y = OPS.grouped_linear(*q.packed(), n, x, ends)
            back = OPS.grouped_linear_grad_input(*q.packed(), k, grad, ends)
            assert y.shape == (rows, n) and back.shape == (rows, k) and not y[-2:].any() and not back[-2:].any()
            first = 0
            for expert, last in enumerate(ends.tolist()):
                weight, mine = q[expert].packed(), slice(first, last)
                assert torch.equal(y[mine], OPS.linear(*weight, n, x[mine], None)), (n, k, counts)
                assert torch.equal(back[mine], OPS.linear_grad_input(*weight, k, grad[mine])), (n, k, counts)
                first = last


@native
@given(st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=9), st.integers(0, 3), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_any_routing(counts, left, dtype):
    torch.manual_seed(0)
    n, k = 5, 64
    q = hb.quantize(torch.randn(len(counts), n, k) / k**0.5, "nf4", 64)
    x, ends = torch.randn(sum(counts) + left, k).to(dtype), ends_of(counts)
    y = OPS.grouped_linear(*q.packed(), n, x, ends).double()
    exact = plain(q, x.double(), ends)
    # A weight's rounding and the result's, half an eps each, and a float32 sum of k terms (test_cpu.py).
    magnitude = k * x.double().abs().amax(1, keepdim=True) * q.dequantize().abs().max() if len(x) else 0
    assert ((y - exact).abs() <= (torch.finfo(dtype).eps * 2 + k * 2.0**-23) * magnitude).all()


@native
def test_rows_do_not_mix(isa):
    """What is not a number stays in its row, and with the rows of its expert."""
    q = hb.quantize(torch.randn(3, 7, 64))
    x = torch.randn(6, 64).bfloat16()
    x[1, 3] = torch.inf
    q.scale_absmax[0] = 1
    y = OPS.grouped_linear(*q.packed(), 7, x, ends_of((2, 0, 3)))
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, True, True, True, True]))


def test_slices_of_experts_and_strided_rows():
    """Experts 1 to 4 of six, of which none begins with a block."""
    q = hb.quantize(torch.randn(6, 5, 33), "nf4", 32)
    x = torch.randn(33, 9).t()
    ends = torch.tensor([[3, 0], [3, 0], [8, 0]], dtype=torch.int32)[:, 0]
    expected = OPS.grouped_linear(*q.packed(), 5, x.contiguous(), torch.tensor([0, 3, 3, 8, 8, 8], dtype=torch.int32))
    found = OPS.grouped_linear(*q[1:4].packed(), 5, x, ends)
    assert torch.equal(found[:8], expected[:8])


@pytest.mark.parametrize("op", ["grouped_linear", "grouped_linear_grad_input"])
def test_gradients(op):
    """First and second derivatives against finite differences, in float64 (gradcheck's own tolerances)."""
    q = hb.quantize(torch.randn(4, 7, 33), "nf4", 32)
    forward = op == "grouped_linear"
    rows = torch.randn(6, 33 if forward else 7, dtype=torch.float64, requires_grad=True)
    ends = ends_of((2, 0, 3, 0))

    def product(rows):
        return getattr(OPS, op)(*q.packed(), 7 if forward else 33, rows, ends)

    assert torch.autograd.gradcheck(product, (rows,))
    assert torch.autograd.gradgradcheck(product, (rows,))


def test_autograd_keeps_the_packed_weight_and_nothing_decoded():
    q, x = hb.quantize(torch.randn(5, 40, 64)), torch.randn(4, 64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = OPS.grouped_linear(*q.packed(), 40, x, ends_of((1, 0, 0, 3, 0)))
    held = {t.data_ptr() for t in saved}
    assert {inner.data_ptr() for inner in q.inner_tensors.values()} <= held
    assert sum(t.nbytes for t in saved) <= q.nbytes + 5 * 4 + 16
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize(
    ("rows", "ends", "said"),
    [
        (torch.randn(4, 64), torch.tensor([1, 0, 4], dtype=torch.int32), r"4 rows cannot end at \[1, 0, 4\]"),
        (torch.randn(4, 64), torch.tensor([1, 2, 5], dtype=torch.int32), r"cannot end at \[1, 2, 5\]"),
        (torch.randn(4, 64), torch.tensor([-1, 2, 3], dtype=torch.int32), r"cannot end at \[-1, 2, 3\]"),
        (torch.randn(4, 64), torch.tensor([1, 2, 4]), r"int64 \(3,\).*takes int32 \[experts\]"),
        (torch.randn(4, 64), torch.tensor([[1, 2, 4]], dtype=torch.int32), r"\(1, 3\)"),
        (torch.randn(2, 2, 64), torch.tensor([1, 2, 4], dtype=torch.int32), r"not \(2, 2, 64\)"),
        (torch.randn(64), torch.tensor([1], dtype=torch.int32), r"not \(64,\)"),
    ],
)
def test_rows_and_ends_that_do_not_fit_are_refused(ops, rows, ends, said):
    if ops == "native" and not isinstance(NATIVE, Native):
        pytest.skip("there is no native library")
    table = reference.OPS if ops == "reference" else cpu.native_ops().table()
    q = hb.quantize(torch.randn(3, 7, 64))
    with pytest.raises(ShapeError, match=said):
        table["grouped_linear"](*q.packed(), 7, rows, ends)


@native
def test_a_weight_of_fewer_experts_than_ends_is_refused():
    q = hb.quantize(torch.randn(3, 7, 64))
    with pytest.raises(ShapeError, match="codes of a packed weight"):
        OPS.grouped_linear(*q.packed(), 7, torch.randn(4, 64), ends_of((1, 1, 1, 1)))
