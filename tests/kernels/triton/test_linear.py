"""Products on each of the three ways against the exact ones, within a bound that `allowed` derives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ShapeError
from halfbyte.kernels import reference, tuning
from halfbyte.kernels.triton import pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = tuning.Tile(16, 32, 64, 4, 2)
# Rows up to which a row by itself, and tiles, take a product; tiles in parts of the sum, and one part.
WAYS = {
    "vector": {"vector_rows": 99, "vector_summands": 128, "vector_outputs": 16},
    "pairs vector": {"vector_rows": 99, "pairs": True},
    "tiles": {"vector_rows": 0, "linear_rows": 99, "grad_rows": 99, "few": SMALL, "many": SMALL, "programs": 0},
    "split": {"vector_rows": 0, "linear_rows": 99, "grad_rows": 99, "few": SMALL, "many": SMALL, "programs": 999},
    "shuffled vector": {"vector_rows": 99, "shuffle": True},
    "shuffled tiles": {"vector_rows": 0, "linear_rows": 99, "grad_rows": 99, "shuffle": True},
    "decoded": {"vector_rows": 0, "linear_rows": 0, "grad_rows": 0},
}
# (rows of W, columns, block): one output and ragged tiles, rows that straddle blocks, a block of several rows.
WEIGHTS = ((1, 64, 64), (37, 352, 64), (35, 96, 64), (5, 544, 4096))


@pytest.fixture(params=WAYS)
def way(request, monkeypatch, device):
    """Makes every product go that way."""
    if "shuffled" in request.param and (device == "cpu" or torch.version.hip):
        pytest.skip("only NVIDIA's cards have this")
    table = tuning.GPU_TUNING
    for capability, line in list(table.items()):
        monkeypatch.setitem(table, capability, dataclasses.replace(line, **WAYS[request.param]))
    return request.param


def decoded(q, way, dtype, cast):
    """What the kernels multiply by: a row by itself in float32, else the weight in the dtype of x.

    By pairs of bfloat16 the values are rounded before they are scaled.
    """
    weight = reference.OPS["dequantize"](*q.packed(), list(q.shape), torch.float32)
    if way == "pairs vector" and dtype == torch.bfloat16:
        values = pairs.pair_values(q.spec.format).to(weight.device)[q.packed().codes.long()].view(weight.shape)
        scales = reference.OPS["dequantize"](
            *q.packed()._replace(codes=torch.full_like(q.packed().codes, 0xFF)), list(q.shape), torch.float32
        )
        return values.double() * scales.double()
    return (weight if "vector" in way else cast(weight, dtype)).double()


def allowed(x, weight, dtype):
    """The error of a float32 sum of k terms (k eps of their magnitudes), of their factors, and of rounding the result.

    Twice the rounding: the interpreter cuts digits off. The decoded way's order of summation is the vendor's.
    """
    info = torch.finfo(dtype)
    magnitude = x.double().abs() @ weight.abs().T
    subnormal = info.smallest_normal * info.eps
    return ((x.shape[-1] + 8) * 2.0**-23 + info.eps) * magnitude + subnormal


@pytest.mark.parametrize(("dtype", "scale_bits"), list(zip(DTYPES, (6, 8, None), strict=True)))
def test_forward_and_backward(ops, device, cast, way, dtype, scale_bits):
    rows = 2 if "vector" in way else 17
    for n, k, block_size in WEIGHTS:
        q = hb.quantize(torch.randn(n, k) / k**0.5, "nf4", block_size, scale_bits).to(device)
        weight = decoded(q, way, dtype, cast)
        bias = torch.randn(n, device=device).to(dtype)
        x, grad = torch.randn(rows, k, device=device).to(dtype), torch.randn(rows, n, device=device).to(dtype)
        y = ops["linear"](*q.packed(), n, x, bias)
        error = (y.double() - x.double() @ weight.T - bias.double()).abs()
        limit = allowed(x, weight, dtype) + torch.finfo(dtype).eps * bias.double().abs()
        assert y.dtype == dtype and (error <= limit).all(), (n, k, block_size, (error / limit).max())
        back = ops["linear_grad_input"](*q.packed(), k, grad)
        of_grad = decoded(q, "tiles", dtype, cast)
        error = (back.double() - grad.double() @ of_grad).abs()
        assert back.shape == (rows, k) and (error <= allowed(grad, of_grad.T, dtype)).all(), (n, k, block_size)


def test_products_are_those_of_bitsandbytes(ops, device, way):
    """Forward and backward in float32, on bitsandbytes' own bytes: two sums of the same terms, each in its bound."""
    bnb = pytest.importorskip("bitsandbytes")
    n, k, rows = 48, 128, 3
    w = torch.randn(n, k, device=device) / k**0.5
    codes, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = (codes.view(-1), state.absmax, state.state2.absmax, state.offset, "nf4", 64, 8, 0, 0)
    x, grad = torch.randn(rows, k, device=device, requires_grad=True), torch.randn(rows, n, device=device)
    wanted = bnb.matmul_4bit(x, codes.t(), state)
    wanted.backward(grad)
    weight = bnb.functional.dequantize_4bit(codes, state).double()
    found, back = ops["linear"](*packed, n, x.detach(), None), ops["linear_grad_input"](*packed, k, grad)
    assert ((found - wanted.detach()).abs() <= 2 * allowed(x.detach(), weight, torch.float32)).all()
    assert ((back - x.grad).abs() <= 2 * allowed(grad, weight.T, torch.float32)).all()


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_an_adapter_beside_the_product(ops, device, cast, way, rank):
    n, k, dtype = 37, 160, torch.float16  # which the interpreter rounds
    q = hb.quantize(torch.randn(n, k) / k**0.5, "nf4", 32).to(device)
    weight = decoded(q, way, dtype, cast)
    x, bias = torch.randn(3, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    a, b = torch.randn(rank, k, device=device) / k**0.5, torch.randn(n, rank, device=device) / rank**0.5
    for rows in ([3], [2]):  # all rows, which may be fused, and some
        y = ops["linear_lora"](*q.packed(), n, x, bias, [a], [b], [0.75], rows)
        inputs = (x[: rows[0]] @ a.to(dtype).t()).double()
        branch = 0.75 * inputs @ b.to(dtype).double().T
        exact = x.double() @ weight.T + bias.double()
        exact[: rows[0]] += branch
        size = exact.abs().max() + branch.abs().max()
        # A's product is rounded as above, in the order of torch; B's enters with its own rounding, and so does the sum.
        limit = allowed(x, weight, dtype) + 8 * torch.finfo(dtype).eps * size
        assert ((y.double() - exact).abs() <= limit).all(), rows


def test_several_adapters_and_none(ops, device):
    n, k = 33, 64
    q = hb.quantize(torch.randn(n, k), "nf4", 32).to(device)
    x = torch.randn(5, k, device=device)
    a, b = [torch.randn(4, k, device=device)] * 2, [torch.randn(n, 4, device=device)] * 2
    for arguments in ((a, b, [0.5, 2.0], [1, 2]), ([], [], [], [])):
        y = ops["linear_lora"](*q.packed(), n, x, None, *arguments)
        expected = reference.OPS["linear_lora"](*q.packed(), n, x, None, *arguments)
        assert torch.allclose(y, expected, rtol=0, atol=k * 2.0**-23 * float(expected.abs().max()) * 8)


def test_slices_shapes_and_other_weights(ops, device, cast, way):
    """Rows from the middle of a weight, x of several dimensions and strides, 8-bit codes, odd columns, no rows."""
    dtype = torch.float16
    whole = hb.quantize(torch.randn(40, 96), "nf4", 64).to(device)
    others = (hb.quantize(torch.randn(9, 64), "int8"), hb.quantize(torch.randn(9, 33)))
    for q in (whole.rows(3, 33), *(other.to(device) for other in others)):
        n, k = q.shape
        x = torch.randn(k, 3, device=device).to(dtype).t()
        fused = "vector" in way and k % 32 == 0 and q.spec.format == "nf4"
        weight = decoded(q, "vector" if fused else "tiles", dtype, cast)
        y = ops["linear"](*q.packed(), n, x, None)
        assert ((y.double() - x.double() @ weight.T).abs() <= allowed(x, weight, dtype)).all(), (n, k)
        assert ops["linear"](*q.packed(), n, torch.randn(k, device=device), None).shape == (n,)
        assert ops["linear"](*q.packed(), n, torch.randn(2, 0, k, device=device), None).shape == (2, 0, n)
        assert ops["linear_grad_input"](*q.packed(), k, torch.randn(0, n, device=device)).shape == (0, k)


def test_a_row_that_is_not_finite_stays_alone(ops, device, way):
    q = hb.quantize(torch.randn(35, 128), "nf4", 64).to(device)
    x = torch.randn(3, 128, device=device).half()
    x[1, 70] = torch.inf
    y = ops["linear"](*q.packed(), 35, x, None)
    assert torch.equal(y.isfinite().all(1).cpu(), torch.tensor([True, False, True]))


def test_wrong_sizes_are_refused(ops, device):
    good = hb.quantize(torch.randn(8, 128)).to(device).packed()
    with pytest.raises(ShapeError):
        ops["linear"](*good, 8, torch.randn(2, 256, device=device), None)
    with pytest.raises(ShapeError):
        ops["linear"](*good, 8, torch.randn(2, 128, device=device), torch.randn(7, device=device))
    with pytest.raises(ShapeError):
        ops["linear_grad_input"](*good, 256, torch.randn(2, 8, device=device))
    with pytest.raises(ShapeError):
        ops["linear"](*good, 8, torch.randn(2, 128, device="meta"), None)
