"""A few-row product with adapters beside it, on every instruction set that this CPU has, against the formula."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import ShapeError
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.cpu.library import Native

OPS = torch.ops.halfbyte
NATIVE = cpu.native_library()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 7, 8, 64, 65, 130)
# (rows of W, columns, block): one output, ragged tiles, blocks of two tables, more than one piece of work.
WEIGHTS = ((1, 64, 64), (37, 192, 32), (65, 256, 64), (130, 1024, 512))

pytestmark = pytest.mark.skipif(not isinstance(NATIVE, Native), reason="there is no native library")


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass
class Adapters:
    """What `linear_lora` takes after the arguments of `linear`."""

    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scaling: list[float]
    rows: list[int]

    def args(self):
        return self.a, self.b, self.scaling, self.rows


def adapters(n, k, ranks, rows, dtype) -> Adapters:
    a = [(torch.randn(rank, k) / k**0.5).to(dtype) for rank in ranks]
    b = [torch.randn(n, rank).to(dtype) for rank in ranks]
    return Adapters(a, b, [0.5 + i for i in range(len(ranks))], rows)


def branches(x, n, adapters, transform=lambda t: t):
    """The adapters' part of the product in float64, of `transform`ed factors."""
    total, first = torch.zeros(len(x), n, dtype=torch.float64), 0
    for a, b, scaling, rows in zip(*adapters.args(), strict=True):
        part = transform(x[first : first + rows].double())
        total[first : first + rows] = part @ transform(a.double()).T @ transform(b.double()).T * scaling
        first += rows
    return total


def check(q, x, bias, some, cast=0.0):
    """Within the error of the product (tests/kernels/test_cpu.py derives it), of the branch's float32 sums, and of
    rounding their sum. `cast`: relative error of the branch where its factors are rounded too."""
    (n, k), eps = q.shape, torch.finfo(x.dtype).eps
    weight = q.dequantize(torch.float64)
    y = OPS.linear_lora(*q.packed(), n, x, bias, *some.args())
    assert y.dtype == x.dtype and y.shape == (len(x), n)
    exact = x.double() @ weight.T + branches(x, n, some)
    magnitude, of_branch = x.double().abs() @ weight.abs().T, branches(x, n, some, torch.abs)
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    rank = max((len(a) for a in some.a), default=0)
    allowed = (2 * eps + k * 2.0**-23) * magnitude + (eps / 2 + (k + rank + 2) * 2.0**-23 + cast) * of_branch
    error = (y.double() - exact).abs()
    assert (error <= allowed * (1 + eps) + torch.finfo(x.dtype).smallest_normal).all(), (n, k, x.dtype, error.max())


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(isa, dtype, adapter_dtype):
    """The adapter's own numbers are multiplied, not numbers rounded to the activations' dtype."""
    for n, k, block_size in WEIGHTS:
        q = hb.quantize(torch.randn(n, k) / k**0.5, "nf4", block_size)
        for rank, rows in zip(RANKS, (1, 2, 3, 4, 1, 4), strict=True):
            x = torch.randn(rows, k, dtype=dtype)
            bias = torch.randn(n, dtype=dtype) if rank % 2 else None
            check(q, x, bias, adapters(n, k, [rank], [rows], adapter_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(isa, dtype):
    """Where torch's GEMM takes the branch, A, B and x A^T are rounded to x's dtype: half an eps each."""
    n, k = 70, 192
    q = hb.quantize(torch.randn(n, k) / k**0.5, "nf4", 64)
    x = torch.randn(40, k, dtype=dtype)
    for rows in range(1, 41):
        check(q, x[:rows], None, adapters(n, k, [8], [rows], torch.float32), cast=2 * torch.finfo(dtype).eps)


def test_rows_with_adapters_of_their_own(isa):
    for dtype in DTYPES:
        q = hb.quantize(torch.randn(70, 192) / 14, "nf4", 64)
        x = torch.randn(4, 192, dtype=dtype)
        for ranks, rows in (([3, 16], [1, 2]), ([16, 5, 1], [1, 0, 3]), ([4], [0]), ([], []), ([0, 2], [2, 1])):
            check(q, x, None, adapters(70, 192, ranks, rows, torch.bfloat16))


def test_what_the_few_row_kernels_do_not_take(isa):
    """Rows that straddle blocks, codes of 8 bits, float64, factors of two dtypes: the same result, by torch."""
    for format, n, k in (("nf4", 5, 33), ("int8", 9, 64)):
        q = hb.quantize(torch.randn(n, k) / k**0.5, format, 32)
        check(q, torch.randn(3, k), None, adapters(n, k, [7], [2], torch.float32), cast=2.0**-22)
    q = hb.quantize(torch.randn(9, 64) / 8)
    mixed = adapters(9, 64, [4], [3], torch.float32)
    mixed.b = [mixed.b[0].double()]
    check(q, torch.randn(3, 64), None, mixed, cast=2.0**-22)
    check(q, torch.randn(3, 64, dtype=torch.float64), None, mixed, cast=2.0**-22)


def test_shapes_strides_and_empty_inputs(isa):
    q, some = hb.quantize(torch.randn(40, 128)), adapters(40, 128, [5], [6], torch.float32)
    x = torch.randn(2, 3, 128)
    y = OPS.linear_lora(*q.packed(), 40, x, None, *some.args())
    assert torch.equal(y.view(6, 40), OPS.linear_lora(*q.packed(), 40, x.view(6, 128), None, *some.args()))
    turned = ([some.a[0].t().contiguous().t()], [some.b[0].t().contiguous().t()], some.scaling, some.rows)
    strided = x.view(6, 128).t().contiguous().t()
    assert torch.equal(y.view(6, 40), OPS.linear_lora(*q.packed(), 40, strided, None, *turned))
    one = ([*some.a], [*some.b], some.scaling, [1])
    assert OPS.linear_lora(*q.packed(), 40, x[0, 0], None, *one).shape == (40,)
    none = (some.a, some.b, some.scaling, [0])
    assert OPS.linear_lora(*q.packed(), 40, torch.randn(2, 0, 128), None, *none).shape == (2, 0, 40)


def test_rows_and_adapters_do_not_mix(isa):
    """An infinite input stays in its row, and a factor that is not a number with the rows of its adapter."""
    q, some = hb.quantize(torch.randn(40, 448)), adapters(40, 448, [5, 3], [2, 3], torch.float32)
    some.a[1][2, 100] = torch.nan
    some.b[0][7, 4] = torch.inf
    x = torch.randn(6, 448).bfloat16()
    x[1, 3] = torch.inf
    y = OPS.linear_lora(*q.packed(), 40, x, None, *some.args())
    expected = torch.zeros(6, 40, dtype=torch.bool)
    expected[0, 7] = expected[1] = expected[2:5] = True
    assert torch.equal(~y.isfinite(), expected)


def work(dtype, adapter_dtype) -> list[torch.Tensor]:
    """Products of more than one piece of work, one adapter and two."""
    torch.manual_seed(1)
    n, k = 200, 576
    q = hb.quantize(torch.randn(n, k))
    results = []
    for ranks, rows in (([16], [1]), ([7, 33], [2, 1])):
        some = adapters(n, k, ranks, rows, adapter_dtype)
        x = torch.randn(sum(rows), k).to(dtype)
        results.append(OPS.linear_lora(*q.packed(), n, x, None, *some.args()))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads_and_to_several_callers(isa, threads, dtype):
    threads(1)
    expected = work(dtype, torch.float32)
    for count in (1, 2, 3):
        threads(count)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(work(dtype, torch.float32), expected, strict=True))
    some = adapters(200, 576, [7, 33], [2, 1], torch.bfloat16)
    q, x = hb.quantize(torch.randn(200, 576)), torch.randn(3, 576).to(dtype)
    alone = OPS.linear_lora(*q.packed(), 200, x, None, *some.args())
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(OPS.linear_lora, *q.packed(), 200, x, None, *some.args()) for _ in range(40)]
        assert all(torch.equal(call.result(), alone) for call in calls)


@pytest.mark.parametrize(
    "broken",
    [
        {"a": [torch.randn(4, 64)]},
        {"a": [torch.randn(5, 128)]},
        {"a": [torch.randn(128)]},
        {"b": [torch.randn(4, 9)]},
        {"b": [torch.tensor(1.0)]},
        {"a": []},
        {"scaling": [1.0, 2.0]},
        {"rows": [4]},
        {"rows": [-1]},
        {"a": [torch.randn(4, 128, device="meta")]},
        {"b": [torch.randn(9, 4, device="meta")]},
    ],
    ids=lambda broken: next(iter(broken)),  # tensors in a name would differ between processes
)
def test_adapters_that_do_not_fit_are_refused(broken):
    q, good = hb.quantize(torch.randn(9, 128)), adapters(9, 128, [4], [3], torch.float32)
    args = {**vars(good), **broken}
    call = [*q.packed(), 9, torch.randn(3, 128), None, *(args[name] for name in ("a", "b", "scaling", "rows"))]
    with pytest.raises(ShapeError):
        cpu.native_ops().linear_lora(*call)
    if not any(one.is_meta for one in (*args["a"], *args["b"])):
        with pytest.raises(ShapeError):
            reference.OPS["linear_lora"](*call)
