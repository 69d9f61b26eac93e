"""halfbyte's own kernels give the same bits with one thread and two, time after time, to several callers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import halfbyte as hb
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.tuning import TUNING

OPS = torch.ops.halfbyte
NATIVE = cpu.native_library()
RUNS, CALLERS = 100, 4
# More than one piece of work for each op (csrc/api.cpp): 64 rows of W, 512 columns of W, 65,536 elements.
N, K = 200, 576
ROWS = (1, 3, 17, 130)

pytestmark = pytest.mark.skipif(not isinstance(NATIVE, Native), reason="there is no native library")


@pytest.fixture(params=NATIVE.isas() if isinstance(NATIVE, Native) else ())
def isa(request, monkeypatch):
    """Every instruction set in turn, its own kernels for any number of rows: torch's GEMM makes no such promise."""
    before = NATIVE.isa
    most = dict.fromkeys(("linear_rows", "linear_rows_float", "grad_rows", "grad_rows_float"), max(ROWS))
    monkeypatch.setitem(TUNING, request.param, replace(TUNING[request.param], **most))
    NATIVE.use(request.param)
    yield request.param
    NATIVE.use(before)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def work(dtype: torch.dtype) -> list[torch.Tensor]:
    """The results of every op, linear and its gradient for all of ROWS."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(N, K, generator=generator)
    q = hb.quantize(w, "nf4", 64, 8)
    results = [*OPS.quantize(w.to(dtype), "nf4", 64), *OPS.quantize_scales(w[0].abs(), 8), q.dequantize(dtype)]
    results.append(OPS.dequantize_rows(*q.packed(), K, torch.arange(N).flip(0), dtype))
    bias = torch.randn(N, generator=generator).to(dtype)
    for rows in ROWS:
        x, grad = torch.randn(rows, K, generator=generator), torch.randn(rows, N, generator=generator)
        results.append(OPS.linear(*q.packed(), N, x.to(dtype), bias))
        results.append(OPS.linear_grad_input(*q.packed(), K, grad.to(dtype)))
    experts = hb.quantize(torch.randn(4, 70, K, generator=generator))
    ends = torch.tensor([1, 1, 34, max(ROWS)], dtype=torch.int32)
    results.append(OPS.grouped_linear(*experts.packed(), 70, x.to(dtype), ends))
    results.append(OPS.grouped_linear_grad_input(*experts.packed(), K, grad[:, :70].to(dtype), ends))
    return results


def same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_runs_and_four_callers(isa, threads, dtype):
    threads(1)
    expected = work(dtype)
    assert same(work(dtype), expected)
    threads(2)
    assert all(same(work(dtype), expected) for _ in range(RUNS))

    def caller(_: int) -> bool:
        return all(same(work(dtype), expected) for _ in range(RUNS // CALLERS))

    with ThreadPoolExecutor(CALLERS) as pool:
        assert all(pool.map(caller, range(CALLERS)))


def test_a_weight_of_several_threads_work(isa, threads):
    """torch's own mean of 40,000 scales would depend on the threads."""
    w = torch.randn(2_500_001, generator=torch.Generator().manual_seed(2))
    threads(1)
    expected = hb.quantize(w)
    for count in (2, 3):
        threads(count)
        assert hb.quantize(w).same_bytes(expected)
