"""Grouped products in one kernel against the exact ones, and what the ends of the groups may be."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ShapeError
from halfbyte.kernels import reference, tuning
from halfbyte.kernels.triton import grouped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = tuning.Tile(16, 32, 64, 4, 2)
# Rows of each expert: none first and last, one, more than a tile, all with one expert, an expert alone.
ROUTINGS = ((0, 1, 20, 3, 0), (0, 0, 33), (17,), (1, 1, 1, 1, 1, 1, 1), (0, 0))
# (rows of an expert's matrix, columns, block): one output and ragged tiles, experts that straddle blocks.
WEIGHTS = ((1, 64, 64), (37, 96, 32), (35, 160, 4096))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter computes tiles whole, however little of them is there."""
    for capability, line in list(tuning.GPU_TUNING.items()):
        monkeypatch.setitem(tuning.GPU_TUNING, capability, dataclasses.replace(line, few=SMALL, many=SMALL))


def ends_of(counts, device) -> torch.Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)


def exact(weight, rows, ends, transposed):
    """The products in float64 with the decoded weight, and the sums of their magnitudes."""
    owner = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device), right=True)
    matrices = torch.cat([weight, torch.zeros_like(weight[:1])])[owner]
    matrices = matrices if transposed else matrices.transpose(1, 2)
    product = (rows.double()[:, None] @ matrices)[:, 0]
    return product, (rows.double().abs()[:, None] @ matrices.abs())[:, 0]


@pytest.mark.parametrize(("dtype", "scale_bits"), list(zip(DTYPES, (6, 8, None), strict=True)))
def test_forward_and_backward(ops, device, cast, dtype, scale_bits):
    info = torch.finfo(dtype)
    for n, k, block_size in WEIGHTS:
        for counts in ROUTINGS:
            q = hb.quantize(torch.randn(len(counts), n, k) / k**0.5, "nf4", block_size, scale_bits).to(device)
            weight = cast(reference.OPS["dequantize"](*q.packed(), list(q.shape), torch.float32), dtype).double()
            ends, rows = ends_of(counts, device), sum(counts) + 2  # two that belong to no expert
            x, grad = torch.randn(rows, k, device=device).to(dtype), torch.randn(rows, n, device=device).to(dtype)
            calls = (("grouped_linear", n, x, False), ("grouped_linear_grad_input", k, grad, True))
            for op, features, given, transposed in calls:
                found = ops[op](*q.packed(), features, given, ends)
                product, magnitude = exact(weight, given, ends, transposed)
                # As test_linear.py derives it: the sum, the factors, and the result, which the interpreter cuts off.
                limit = ((given.shape[1] + 8) * 2.0**-23 + info.eps) * magnitude + info.smallest_normal * info.eps
                assert found.dtype == dtype and found.shape == product.shape
                assert ((found.double() - product).abs() <= limit).all(), (op, n, k, counts)
                assert not found[-2:].any()


def test_other_weights_run_on_the_reference(ops, device):
    ends = ends_of((2, 0, 3), device)
    for q in (hb.quantize(torch.randn(3, 5, 33)), hb.quantize(torch.randn(3, 5, 64), "int8")):
        q = q.to(device)
        x = torch.randn(5, q.shape[2], device=device)
        found = ops["grouped_linear"](*q.packed(), 5, x, ends)
        assert torch.equal(found, reference.OPS["grouped_linear"](*q.packed(), 5, x, ends))


def test_experts_cut_out_of_more_and_strided_rows(ops, device):
    q = hb.quantize(torch.randn(6, 5, 96), "nf4", 64).to(device)
    x, ends = torch.randn(96, 8, device=device).half().t(), ends_of((3, 0, 5), device)
    found = ops["grouped_linear"](*q[1:4].packed(), 5, x, ends)
    whole = ops["grouped_linear"](*q.packed(), 5, x.contiguous(), ends_of((0, 3, 0, 5, 0, 0), device))
    assert torch.equal(found, whole)


@pytest.mark.parametrize("ends", [[3, 1, 2], [-5, 2, 9], [2**31 - 1, -(2**31), 4]])
def test_wrong_ends_write_nothing_outside(ops, device, monkeypatch, ends):
    """The host does not read them, so what they give is no promise, but it has to stay inside the result."""
    q = hb.quantize(torch.randn(3, 5, 64)).to(device)
    x, ends = torch.randn(4, 64, device=device), torch.tensor(ends, dtype=torch.int32, device=device)
    around = torch.full((64, 64), 7.0, device=device)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: around.view(-1)[2048:][: shape[0] * shape[1]].view(shape))
    inside = ops["grouped_linear"](*q.packed(), 5, x, ends)
    assert inside.data_ptr() == around[32:].data_ptr()
    assert (around[:32] == 7).all() and (around.view(-1)[2048 + 20 :] == 7).all()
    ops["grouped_linear_grad_input"](*q.packed(), 64, x[:, :5], ends)
    assert (around[:32] == 7).all() and (around[36:] == 7).all()


def test_nothing_and_wrong_sizes(ops, device):
    q, ends = hb.quantize(torch.randn(3, 5, 64)).to(device), ends_of((0, 0, 0), device)
    assert ops["grouped_linear"](*q.packed(), 5, torch.randn(0, 64, device=device), ends).shape == (0, 5)
    x = torch.randn(4, 64, device=device)
    for wrong in (
        (5, x[0], ends),
        (5, x, ends.long()),
        (5, x, ends[None]),
        (5, x, ends.to("meta")),
        (6, x, ends),
        (5, torch.randn(4, 128, device=device), ends),
        (5, x, ends_of((1, 1, 1, 1), device)),
    ):
        with pytest.raises(ShapeError):
            ops["grouped_linear"](*q.packed(), *wrong)


def stand_in(calls):
    """torch's grouped GEMM as it is documented: ends as int32 on the device, rows from the last one on as they were."""

    def grouped_mm(x, weight, *, offs):
        assert x.dtype == weight.dtype == torch.bfloat16 and offs.dtype == torch.int32 and len(offs) == len(weight)
        assert x.is_contiguous() and 1 in weight.stride()[1:]
        calls.append((len(weight), len(x)))
        y = torch.full((len(x), weight.shape[2]), torch.nan, dtype=x.dtype, device=x.device)
        for expert, (first, last) in enumerate(pairwise([0, *offs.tolist()])):
            y[first:last] = x[first:last] @ weight[expert]
        return y

    return grouped_mm


@pytest.mark.parametrize("together", [5, 2, 1])
def test_decoded_experts_by_torchs_grouped_product(ops, device, cast, monkeypatch, together):
    """Some experts at a time: none of the last two has rows, and two rows belong to no expert."""
    n, k, counts, calls = 40, 96, (0, 7, 20, 0, 0), []
    for capability, line in list(tuning.GPU_TUNING.items()):
        wanted = dataclasses.replace(line, grouped_rows=5, decoded_bytes=together * n * k * 2 + 7)
        monkeypatch.setitem(tuning.GPU_TUNING, capability, wanted)
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        monkeypatch.setattr(grouped, "_vendors_product", lambda *_: stand_in(calls))
    q = hb.quantize(torch.randn(5, n, k) / k**0.5, "nf4", 64).to(device)
    weight = cast(reference.OPS["dequantize"](*q.packed(), list(q.shape), torch.float32), torch.bfloat16).double()
    ends = ends_of(counts, device)
    for op, features, length, transposed in (
        ("grouped_linear", n, k, False),
        ("grouped_linear_grad_input", k, n, True),
    ):
        given = torch.randn(29, length, device=device).bfloat16()
        found = ops[op](*q.packed(), features, given, ends)
        product, magnitude = exact(weight, given, ends, transposed)
        limit = ((length + 8) * 2.0**-23 + torch.finfo(torch.bfloat16).eps) * magnitude
        assert ((found.double() - product).abs() <= limit).all()
        assert not found[-2:].any()
        few = ops[op](*q.packed(), features, given[:24], ends_of((0, 7, 17, 0, 0), device))
        assert ((few.double() - product[:24]).abs() <= limit[:24]).all()
    if calls:  # of 24 rows too few are each expert's
        each = {5: [(5, 29)], 2: [(2, 7), (2, 20)], 1: [(1, 7), (1, 20)]}[together]
        assert calls == 2 * each


def test_torchs_grouped_product_is_taken_only_where_it_has_a_kernel(monkeypatch):
    class Rows:
        dtype, is_cuda, device = torch.bfloat16, True, "cuda"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", "public", raising=False)
    monkeypatch.setattr(torch, "_grouped_mm", "private", raising=False)
    assert grouped._vendors_product(Rows(), 64, 8) == "public"
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert grouped._vendors_product(Rows(), 64, 8) == "private"
    assert grouped._vendors_product(Rows(), 60, 8) is None
    monkeypatch.setattr(Rows, "dtype", torch.float16)
    assert grouped._vendors_product(Rows(), 64, 8) is None
    monkeypatch.setattr(Rows, "dtype", torch.bfloat16)
    monkeypatch.delattr(torch, "_grouped_mm")  # torch 2.6
    assert grouped._vendors_product(Rows(), 64, 8) is None
    monkeypatch.setattr(torch, "_grouped_mm", "private", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert grouped._vendors_product(Rows(), 64, 8) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_host_never_waits(ops, device):
    q = hb.quantize(torch.randn(8, 64, 64)).to(device)
    x, ends = torch.randn(16, 64, device=device).bfloat16(), ends_of([2] * 8, device)
    ops["grouped_linear"](*q.packed(), 64, x, ends)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops["grouped_linear"](*q.packed(), 64, x, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_products_are_those_of_bitsandbytes_expert_by_expert(ops, device):
    """Each expert quantized there; put together, their scales have no second level."""
    bnb = pytest.importorskip("bitsandbytes")
    n, k, counts = 48, 128, (0, 3, 1, 5)
    made = [
        bnb.functional.quantize_4bit(torch.randn(n, k, device=device), blocksize=64, quant_type="nf4") for _ in counts
    ]
    codes, absmax = torch.cat([one.view(-1) for one, _ in made]), torch.cat([state.absmax for _, state in made])
    x = torch.randn(sum(counts), k, device=device)
    found = ops["grouped_linear"](codes, absmax, None, None, "nf4", 64, 0, 0, 0, n, x, ends_of(counts, device))
    parts = zip(x.split(counts), made, strict=True)
    wanted = torch.cat([bnb.matmul_4bit(rows, one.t(), state) for rows, (one, state) in parts if len(rows)])
    weights = torch.stack([bnb.functional.dequantize_4bit(*one) for one in made]).double()
    _, magnitude = exact(weights, x, ends_of(counts, device), False)
    assert ((found - wanted).abs() <= 2 * (k + 8) * 2.0**-23 * magnitude).all()
