"""The native CPU kernels against the reference, for every instruction set that this CPU has.

Codes, scales and decoded weights have to be equal to the bit. A product sums in another order than torch's GEMM, so it
is compared with the exact one (float64) within a bound that `bound` derives.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import halfbyte as hb
import make_tables
from halfbyte.errors import FormatError, RequestError, ShapeError
from halfbyte.formats import FORMATS
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.cpu import library as library_module
from halfbyte.kernels.cpu.library import Missing, Native, load

OPS = torch.ops.halfbyte
NATIVE = cpu.native_library()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd first; 257 x 300 is more than one piece of work and not a multiple of it.
SHAPES = ((1,), (63,), (65,), (7, 3), (127, 129), (64, 96), (257, 300))

pytestmark = pytest.mark.skipif(
    isinstance(NATIVE, Missing), reason="" if isinstance(NATIVE, Native) else f"{NATIVE.reason}; {NATIVE.remedy}"
)
if isinstance(NATIVE, Native) and os.environ.get("HALFBYTE_KERNELS") == "reference":
    pytestmark = pytest.mark.skip(reason="HALFBYTE_KERNELS=reference")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def bound(x: torch.Tensor, w: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """How far a product of k terms may lie from the exact one.

    Each weight is rounded once to the compute dtype (eps / 2 of its magnitude), a float32 sum of k terms errs by at
    most k float32 eps of the sum of magnitudes, and the result is rounded once. Below the normal range a rounding errs
    by half the spacing of subnormal numbers instead; bf16 instructions take float32 subnormals for zero, below 2**-126.
    """
    info = torch.finfo(dtype)
    magnitude = x.double().abs() @ w.double().abs().T
    floor = max(info.smallest_normal * info.eps / 2, 2.0**-126)
    below_normal = floor * (x.double().abs().sum(1, keepdim=True) + 1)
    return (info.eps / 2 + k * 2.0**-23) * magnitude * (1 + info.eps) + info.eps / 2 * magnitude + below_normal


@pytest.mark.parametrize("format", FORMATS)
def test_codes_and_scales_equal_the_reference(isa, format):
    for shape in SHAPES:
        for block_size in (32, 64, 4096):
            for dtype in DTYPES:
                w = torch.randn(shape, dtype=dtype) * 0.02
                codes, scales = OPS.quantize(w, format, block_size)
                expected_codes, expected_scales = reference.OPS["quantize"](w, format, block_size)
                assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales), (shape, block_size)


@pytest.mark.parametrize("format", FORMATS)
def test_special_weights_are_encoded_as_the_reference_does(isa, format):
    thresholds = hb.formats.get_codebook(format).thresholds()
    cases = {
        "zeros": torch.zeros(130),
        "subnormal": torch.full((128,), 1e-39),
        "every threshold": torch.cat([thresholds, thresholds.nextafter(torch.tensor(2.0)), torch.ones(1)]).repeat(3),
        "extremes": torch.tensor([3.4e38, -3.4e38, 1e-38, -0.0] * 20),
        "nan and inf": torch.cat([torch.randn(70), torch.tensor([torch.nan, torch.inf, 1.0]), torch.randn(80)]),
        "strided": torch.randn(20, 34).t(),
        "float64": torch.randn(100, dtype=torch.float64),
    }
    for name, w in cases.items():
        found, expected = OPS.quantize(w, format, 64), reference.OPS["quantize"](w, format, 64)
        assert torch.equal(found[0], expected[0]), name
        assert torch.equal(found[1].nan_to_num(), expected[1].nan_to_num()), name


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_second_level_equals_the_reference(isa, bits):
    for scales in (torch.rand(1), torch.rand(255), torch.rand(1027), torch.full((300,), 0.5), torch.randn(70000)):
        found, expected = OPS.quantize_scales(scales, bits), reference.OPS["quantize_scales"](scales, bits)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_decoded_weights_equal_the_reference(isa, format):
    for shape in SHAPES:
        for block_size, scale_bits in ((32, None), (32, 8), (64, 6), (128, 4), (4096, 8)):
            q = hb.quantize(torch.randn(shape), format, block_size, scale_bits)
            for dtype in DTYPES:
                expected = reference.OPS["dequantize"](*q.packed(), list(shape), dtype)
                assert torch.equal(q.dequantize(dtype), expected), (shape, block_size, scale_bits, dtype)


@pytest.mark.parametrize("scale_bits", [None, 8, 6, 4])
def test_slices_that_begin_inside_a_block(isa, scale_bits):
    for columns in (31, 33, 96):
        q = hb.quantize(torch.randn(700, columns), "nf4", 32, scale_bits)
        whole = q.dequantize(torch.bfloat16)
        x = torch.randn(3, columns)
        for begin, end in ((0, 1), (1, 2), (5, 64), (389, 700)):
            part = q[begin:end]
            assert torch.equal(part.dequantize(torch.bfloat16), whole[begin:end])
            product = OPS.linear(*part.packed(), end - begin, x, None)
            weight = part.dequantize(torch.float32)
            assert ((product - x.double() @ weight.double().T).abs() <= bound(x, weight, columns, x.dtype)).all()


def test_any_float_is_a_scale(isa):
    """Files may hold negative scales, and what a subnormal product rounds to is not for the hardware to decide."""
    count = 64 * 8
    codes = torch.randint(0, 256, (count // 2,), dtype=torch.uint8)
    scales = torch.tensor([-1.5, 0.0, -0.0, 1e-38, 3e-41, 3.3e38, 7e-6, 65519.0])
    for dtype in DTYPES:
        args = (codes, scales, None, None, "nf4", 64, 0, 0, 0, [count], dtype)
        found, expected = OPS.dequantize(*args), reference.OPS["dequantize"](*args)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), dtype
    scales = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 1.0, 1.0, 1.0])
    for dtype in DTYPES:
        args = (codes, scales, None, None, "nf4", 64, 0, 0, 0, [count], dtype)
        assert torch.equal(OPS.dequantize(*args).isnan(), reference.OPS["dequantize"](*args).isnan())


@pytest.mark.parametrize("scale_bits", [None, 8, 6])
def test_rows_equal_the_reference(isa, scale_bits):
    for format, columns in (("nf4", 31), ("int8", 33), ("fp4", 64)):
        q = hb.quantize(torch.randn(300, columns), format, 32, scale_bits)
        for rows in (torch.tensor([[0, 299], [7, 7]]), torch.arange(300)[::3], torch.tensor([5], dtype=torch.int32)):
            found = OPS.dequantize_rows(*q.packed(), columns, rows, torch.bfloat16)
            assert torch.equal(found, q.dequantize(torch.bfloat16)[rows.long()])


# (rows of W, columns, block): whole blocks, straddling rows, odd columns; more columns than 256 scales of one row.
WEIGHTS = ((37, 256, 64), (65, 192, 32), (64, 1024, 512), (5, 64, 64), (3, 16448, 32), (33, 96, 64), (9, 33, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_products(isa, format, dtype):
    for n, k, block_size in WEIGHTS:
        q = hb.quantize(torch.randn(n, k) / k**0.5, format, block_size)
        weight, bias = q.dequantize(torch.float32), torch.randn(n, dtype=dtype)
        for rows in (1, 2, 3, 4, 7, 16, 17, 33, 130):
            x, grad = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
            y = OPS.linear(*q.packed(), n, x, bias)
            exact = x.double() @ weight.double().T + bias.double()
            allowed = bound(x, weight, k, dtype) + torch.finfo(dtype).eps * bias.double().abs()
            assert y.dtype == dtype and ((y.double() - exact).abs() <= allowed).all(), (n, k, block_size, rows)
            back = OPS.linear_grad_input(*q.packed(), k, grad)
            error = (back.double() - grad.double() @ weight.double()).abs()
            assert (error <= bound(grad, weight.T, n, dtype)).all(), (n, k, block_size, rows)


# (rows of W, columns, block): one output, ragged panels, chunks of the sum that are not whole, blocks of two tables.
MANY_ROW_WEIGHTS = ((1, 64, 32), (17, 576, 64), (100, 1088, 32), (513, 640, 128), (300, 8192, 4096))


@pytest.mark.parametrize("rows", [33, 47, 64, 129, 500, 513, 1030])
def test_products_of_many_rows(isa, rows):
    dtype = torch.bfloat16
    for format, (n, k, block_size) in zip(("nf4", "fp4", "int4", "nf4", "e2m1"), MANY_ROW_WEIGHTS, strict=True):
        q = hb.quantize(torch.randn(n, k) / k**0.5, format, block_size)
        weight, bias = q.dequantize(torch.float32), torch.randn(n, dtype=dtype)
        x, grad = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
        y = OPS.linear(*q.packed(), n, x, bias)
        exact = x.double() @ weight.double().T + bias.double()
        allowed = bound(x, weight, k, dtype) + torch.finfo(dtype).eps * bias.double().abs()
        assert y.shape == (rows, n) and ((y.double() - exact).abs() <= allowed).all(), (n, k, block_size)
        back = OPS.linear_grad_input(*q.packed(), k, grad)
        error = (back.double() - grad.double() @ weight.double()).abs()
        assert back.shape == (rows, k) and (error <= bound(grad, weight.T, n, dtype)).all(), (n, k, block_size)


@pytest.mark.parametrize("rows", [33, 129, 1030])
def test_many_rows_repeat_bit_for_bit_on_any_number_of_threads(two_threads, rows):
    if NATIVE.isa != "amx":
        pytest.skip("only AMX has a GEMM of halfbyte's own; torch's makes no such promise")
    for n, k, block_size in MANY_ROW_WEIGHTS:
        q = hb.quantize(torch.randn(n, k) / k**0.5, "nf4", block_size)
        x, grad = torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16()
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append((OPS.linear(*q.packed(), n, x, None), OPS.linear_grad_input(*q.packed(), k, grad)))
        for y, back in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(back, results[0][1]), (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_every_number_of_few_rows(isa, dtype, block_size):
    """Rows change how a kernel shares its registers among rows and blocks; the columns end inside its steps."""
    n, k = 35, 4096 if block_size == 4096 else block_size * (3 if block_size > 32 else 10)
    q = hb.quantize(torch.randn(n, k) / k**0.5, "int4", block_size)
    weight = q.dequantize(torch.float32)
    x = torch.randn(33, k, dtype=dtype)
    exact, allowed = x.double() @ weight.double().T, bound(x, weight, k, dtype)
    for rows in range(1, 34):
        y = OPS.linear(*q.packed(), n, x[:rows], None)
        assert ((y.double() - exact[:rows]).abs() <= allowed[:rows]).all(), rows


def test_rows_and_blocks_do_not_mix(isa):
    """An infinity stays in its row, and a block that is not a number in the rows of W that hold it."""
    q = hb.quantize(torch.randn(40, 448), "nf4", 64, None)
    q.packed().scales[7 * 20 + 3] = torch.nan
    for rows in (1, 2, 4, 7, 16):
        x = torch.randn(rows, 448).bfloat16()
        x[rows - 1, 100] = torch.inf
        y = OPS.linear(*q.packed(), 40, x, None)
        expected = torch.zeros(rows, 40, dtype=torch.bool)
        expected[:, 20] = expected[rows - 1] = True
        assert torch.equal(~y.isfinite(), expected), rows


def test_shapes_of_x(isa):
    q = hb.quantize(torch.randn(40, 128))
    strided = torch.randn(128, 6).t()
    assert torch.equal(
        OPS.linear(*q.packed(), 40, strided, None), OPS.linear(*q.packed(), 40, strided.contiguous(), None)
    )
    bias = torch.randn(40, 2)[:, 0]
    assert torch.equal(
        OPS.linear(*q.packed(), 40, strided, bias), OPS.linear(*q.packed(), 40, strided, bias.contiguous())
    )
    assert OPS.linear(*q.packed(), 40, torch.randn(128), None).shape == (40,)
    assert OPS.linear(*q.packed(), 40, torch.randn(2, 3, 128), None).shape == (2, 3, 40)
    assert OPS.linear(*q.packed(), 40, torch.randn(2, 0, 128), None).shape == (2, 0, 40)
    assert OPS.linear_grad_input(*q.packed(), 128, torch.randn(0, 40)).shape == (0, 128)
    assert torch.equal(
        OPS.linear_grad_input(*q.packed(), 128, torch.randn(40, 3).t().requires_grad_()).isfinite().all(),
        torch.tensor(True),
    )


def work(dtype: torch.dtype) -> list[torch.Tensor]:
    """One call of each op, large enough for several pieces of work."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(520, 576, generator=generator)
    q = hb.quantize(w)
    results = [*q.inner_tensors.values(), q.dequantize(dtype)]
    for rows in (1, 4, 40):
        x, grad = torch.randn(rows, 576, generator=generator), torch.randn(rows, 520, generator=generator)
        results.append(OPS.linear(*q.packed(), 520, x.to(dtype), None))
        results.append(OPS.linear_grad_input(*q.packed(), 576, grad.to(dtype)))
    return results


def test_the_number_of_threads_changes_no_bit(isa, two_threads):
    # 40 rows may go through torch's GEMM, which makes no such promise: only halfbyte's own results are compared.
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_num_threads(1)
        alone = work(dtype)[:-2]
        torch.set_num_threads(2)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(alone, work(dtype)[:-2], strict=True))


def test_several_python_threads_at_once(isa, two_threads):
    expected = work(torch.bfloat16)[:-2]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: work(torch.bfloat16)[:-2], range(12)):
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_committed_tables_are_what_the_codebooks_say():
    assert make_tables.TARGET.read_text(encoding="utf-8") == make_tables.header(), "run python tools/make_tables.py"


def broken_arguments():
    good = hb.quantize(torch.randn(8, 128)).packed()
    short = {
        "codes too short": good._replace(codes=good.codes[:-1]),
        "codes of another dtype": good._replace(codes=good.codes.float()),
        "scales too short": good._replace(scales=good.scales[:-1]),
        "scales of another dtype": good._replace(scales=good.scales.float()),
        "no second level": good._replace(scale_absmax=None),
        "second level of another dtype": good._replace(scale_absmax=good.scale_absmax.double()),
        "empty offset": good._replace(scale_offset=torch.empty(0)),
        "another format": good._replace(format="nf5"),
        "another block size": good._replace(block_size=48),
        "block size 0": good._replace(block_size=0),
        "another width of scales": good._replace(scale_bits=5),
        "negative start": good._replace(start=-1),
        "start past the end": good._replace(start=64),
        "scales start past the end": good._replace(scale_start=300),
    }
    return short.items()


@pytest.mark.parametrize("name", [name for name, _ in broken_arguments()])
def test_broken_arguments_raise(name):
    weight = dict(broken_arguments())[name]
    calls = (
        lambda: OPS.dequantize(*weight, [8, 128], torch.float32),
        lambda: OPS.linear(*weight, 8, torch.randn(2, 128), None),
        lambda: OPS.linear_grad_input(*weight, 128, torch.randn(2, 8)),
    )
    for call in calls:
        with pytest.raises((FormatError, ShapeError)):
            call()
    with pytest.raises((FormatError, ShapeError, IndexError)):
        OPS.dequantize_rows(*weight, 128, torch.tensor([7]), torch.float32)


def test_wrong_sizes_raise():
    good = hb.quantize(torch.randn(8, 128)).packed()
    with pytest.raises(ShapeError):
        OPS.linear(*good, 8, torch.randn(2, 256), None)
    with pytest.raises(ShapeError):
        OPS.linear(*good, 8, torch.randn(2, 128), torch.randn(7))
    with pytest.raises(ShapeError):
        OPS.linear_grad_input(*good, 256, torch.randn(2, 8))
    with pytest.raises(IndexError):
        OPS.dequantize_rows(*good, 128, torch.tensor([8]), torch.float32)
    with pytest.raises(FormatError):
        OPS.quantize(torch.ones(64, dtype=torch.int32), "nf4", 64)
    with pytest.raises(FormatError):
        OPS.quantize(torch.randn(64), "nf4", 63)


def test_scales_that_are_not_aligned_are_copied():
    good = hb.quantize(torch.randn(8, 128), scale_bits=None).packed()
    memory = torch.zeros(good.scales.numel() * 4 + 1, dtype=torch.uint8)
    memory[1:] = good.scales.view(torch.uint8)
    shifted = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1)
    expected = OPS.dequantize(*good, [8, 128], torch.float32)
    assert torch.equal(OPS.dequantize(*good._replace(scales=shifted), [8, 128], torch.float32), expected)


def run_with(**variables: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\nfrom halfbyte.errors import RequestError\n"
        "try:\n    from halfbyte.kernels import chosen\nexcept RequestError as e:\n    print(e); sys.exit(2)\n"
        "print(chosen()[0].name, chosen()[0].reason)"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("value", "rc", "said"),
    [
        ("generic", 0, "native kernels, generic, on torch's OpenMP threads"),
        ("", 0, "native kernels"),
        ("avx1024", 2, "HALFBYTE_CPU_ISA='avx1024' is not offered"),
    ],
)
def test_the_environment_chooses_the_instruction_set(value, rc, said):
    done = run_with(HALFBYTE_CPU_ISA=value, HALFBYTE_KERNELS="cpu")
    assert done.returncode == rc and said in done.stdout, done.stdout + done.stderr


def test_a_missing_or_foreign_library_is_a_reason_and_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(library_module, "_ABI", -1)
    assert "another version" in load().reason
    monkeypatch.setattr(library_module, "FILE", tmp_path / "none.so")
    monkeypatch.setattr(library_module, "NOTE", tmp_path / "none.txt")
    assert "was not built" in load().reason and "pip install" in load().remedy
    Path(tmp_path / "none.txt").write_text("no C++ compiler was found\ninstall one\n")
    assert load() == Missing("no C++ compiler was found", "install one")
    Path(tmp_path / "none.so").write_text("not a library")
    assert "cannot be loaded" in load().reason


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(NATIVE.functions, "hb_set_isa", lambda number: 1)  # what the library answers on a lesser CPU
    before = NATIVE.isa
    with pytest.raises(RequestError, match="'avx512' is not possible here; this build on this CPU has: generic"):
        NATIVE.use("avx512")
    assert NATIVE.isa == before
