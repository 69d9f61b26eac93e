"""The ops' contract: schema, fake, autograd registration, gradients, what autograd keeps, torch.compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import RequestError
from halfbyte.kernels import chosen
from halfbyte.kernels.schema import SCHEMAS

OPS = torch.ops.halfbyte
# Odd on purpose: rows of 33 straddle blocks of 32, and the last block is partial.
ROWS, COLUMNS = 7, 33


def packed(scale_bits: int | None = 8, format: str = "nf4", dtype: torch.dtype = torch.float32):
    return hb.quantize(torch.randn(ROWS, COLUMNS, dtype=dtype), format, 32, scale_bits).packed()


def experts(scale_bits: int | None = 8):
    return hb.quantize(torch.randn(3, ROWS, COLUMNS), "nf4", 32, scale_bits).packed()


def sample_inputs() -> dict[str, list[tuple]]:
    x = torch.randn(2, 3, COLUMNS, requires_grad=True)
    bias = torch.randn(ROWS, requires_grad=True)
    index = torch.tensor([[0, 6], [3, 3]])
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    return {
        "quantize": [(torch.randn(7, 3), "nf4", 32), (torch.randn(64).bfloat16(), "int8", 32)],
        "quantize_scales": [(torch.rand(300), bits) for bits in (8, 6, 4)],
        "dequantize": [(*packed(bits), [ROWS, COLUMNS], torch.bfloat16) for bits in (None, 8, 6, 4)],
        "dequantize_rows": [(*packed(bits), COLUMNS, index, torch.float32) for bits in (None, 6)],
        "linear": [(*packed(), ROWS, x, bias), (*packed(None), ROWS, x, None)],
        "linear_lora": [
            (*packed(), ROWS, x.detach(), bias.detach(), [torch.randn(2, COLUMNS)], [torch.randn(ROWS, 2)], [0.5], [5]),
            (*packed(None), ROWS, x.detach(), None, [], [], [], []),
        ],
        "linear_grad_input": [(*packed(), COLUMNS, torch.randn(5, ROWS, requires_grad=True))],
        "grouped_linear": [(*experts(bits), ROWS, x.flatten(0, 1), ends) for bits in (8, None)],
        "grouped_linear_grad_input": [(*experts(), COLUMNS, torch.randn(6, ROWS, requires_grad=True), ends)],
        "cross_entropy_": [(torch.randn(2, 5), torch.tensor([0, 4]), gradient) for gradient in (False, True)],
        "rms_norm": [(torch.randn(2, 3, 5), torch.randn(5), 1e-6)],
        "rms_norm_grad": [(torch.randn(2, 5), torch.randn(2, 5), torch.randn(5), torch.rand(2))],
        "swiglu": [(torch.randn(2, 5), torch.randn(2, 5))],
        "swiglu_grad": [tuple(torch.randn(2, 5) for _ in range(3))],
        "rotary": [(torch.randn(2, 3, 2, 4), *torch.randn(2, 1, 3, 4), inverse) for inverse in (False, True)],
    }


def test_every_op_has_sample_inputs():
    assert sample_inputs().keys() == SCHEMAS.keys()


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op):
    """Schema, fake, autograd registration and AOT dispatch agree with the implementation."""
    for args in sample_inputs()[op]:
        torch.library.opcheck(getattr(OPS, op).default, args)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale_bits", [None, 8])
def test_gradients_of_linear(scale_bits, with_bias):
    """First and second derivatives against finite differences, in float64 (gradcheck's own tolerances)."""
    weight = packed(scale_bits)
    x = torch.randn(2, COLUMNS, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.float64, requires_grad=True)

    def product(x, bias=None):
        return OPS.linear(*weight, ROWS, x, bias)

    inputs = (x, bias) if with_bias else (x,)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_gradients_where_only_the_bias_or_only_the_input_is_trained():
    weight = packed()
    for x_trained, bias_trained in ((True, False), (False, True)):
        x = torch.randn(4, COLUMNS, requires_grad=x_trained)
        bias = torch.randn(ROWS, requires_grad=bias_trained)
        OPS.linear(*weight, ROWS, x, bias).sum().backward()
        assert (x.grad is not None, bias.grad is not None) == (x_trained, bias_trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)])
def test_linear_is_the_product_with_the_decoded_weight(dtype, shape):
    q = hb.quantize(torch.randn(ROWS, COLUMNS), "nf4", 32)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    bias = torch.randn(ROWS, dtype=dtype)
    y = OPS.linear(*q.packed(), ROWS, x, bias)
    twin = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(twin, q.dequantize(dtype), bias)
    assert torch.equal(y, expected) and y.dtype == dtype
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    # Both sum ROWS products: the order may differ, by ROWS eps of the largest sum of magnitudes.
    bound = ROWS * torch.finfo(dtype).eps * upstream.abs().sum() * q.dequantize().abs().max()
    assert ((x.grad - twin.grad).abs() <= bound).all()


@pytest.mark.parametrize("module", ["tensor", "op"])
def test_autograd_keeps_the_packed_weight_and_never_the_decoded_one(module):
    """Trap 10 (torchtune#693): a decoded weight in the graph costs what 4 bits saved, once a layer."""
    q = hb.quantize(torch.randn(40, 65), "nf4", 64)
    x = torch.randn(3, 65, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if module == "tensor":
            layer = nn.Linear(65, 40)
            layer.weight = nn.Parameter(q, requires_grad=False)
            y = layer(x)
        else:
            y = OPS.linear(*q.packed(), 40, x, None)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= q.numel()]
    held = {t.data_ptr() for t in saved}
    assert {inner.data_ptr() for inner in q.inner_tensors.values()} <= held  # the same bytes, not copies
    y.sum().backward()
    assert x.grad is not None


def test_the_frozen_weight_gets_no_gradient():
    layer = hb.Linear4bit.from_weight(torch.randn(5, 33), torch.randn(5))
    layer(torch.randn(2, 33, requires_grad=True)).sum().backward()
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("scale_bits", [None, 8, 6, 4])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_rows_are_the_rows_of_the_whole(format, scale_bits):
    q = hb.quantize(torch.randn(37, 31), format, 32, scale_bits)
    index = torch.tensor([[0, 36, 5], [5, 5, 17]])
    found = OPS.dequantize_rows(*q.packed(), 31, index, torch.bfloat16)
    assert torch.equal(found, q.dequantize(torch.bfloat16)[index])
    assert OPS.dequantize_rows(*q.packed(), 31, index[:0], torch.float32).shape == (0, 3, 31)


@pytest.mark.parametrize("row", [-1, -100, 37])
def test_a_row_out_of_range_is_an_error(row):
    """An ignored label, -100, must not be looked up as the hundredth row from the end."""
    q = hb.quantize(torch.randn(37, 32), "nf4", 32)
    with pytest.raises(IndexError):
        OPS.dequantize_rows(*q.packed(), 32, torch.tensor([3, row]), torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")
def test_compile_equals_eager():
    layer = nn.Linear(96, 40)
    layer.weight = nn.Parameter(hb.quantize(layer.weight), requires_grad=False)
    x = torch.randn(3, 96, requires_grad=True)
    eager = layer(x)
    eager.sum().backward()
    grad, x.grad = x.grad, None
    compiled = torch.compile(layer, fullgraph=True)(x)
    compiled.sum().backward()
    assert torch.equal(compiled, eager) and torch.equal(x.grad, grad)


def test_chosen_names_every_op_with_a_reason():
    choices = chosen()
    assert {choice.op for choice in choices} == set(SCHEMAS)
    assert all(choice.name and choice.device and choice.reason for choice in choices)


@pytest.mark.parametrize(("value", "rc"), [("nonsense", 2), ("referense", 2), ("reference", 0), ("", 0)])
def test_the_environment_chooses_and_a_wrong_choice_is_refused(value, rc):
    script = (
        "import sys\nfrom halfbyte.errors import RequestError\n"
        "try:\n    from halfbyte.kernels import chosen\nexcept RequestError as e:\n    print(e); sys.exit(2)\n"
        "print(chosen()[0].reason)"
    )
    env = {**os.environ, "HALFBYTE_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == rc, done.stderr
    if rc:
        assert f"HALFBYTE_KERNELS={value!r} is not offered" in done.stdout and "reference" in done.stdout
    elif value:
        assert "HALFBYTE_KERNELS=reference" in done.stdout


def test_the_variable_is_read_through_env(monkeypatch):
    from halfbyte import env

    monkeypatch.setenv("HALFBYTE_KERNELS", " Reference ")
    assert env.kernels() == "reference"
    monkeypatch.setenv("HALFBYTE_KERNELS", "cuda")
    with pytest.raises(RequestError, match=r"choose one of: auto, cpu, triton, reference|did you mean"):
        env.kernels()


def test_no_rows_decode_no_weight(monkeypatch):
    """Most steps of a long prompt want no logits: the output layer gets an empty input."""
    q = hb.quantize(torch.randn(96, 64))
    module = sys.modules["halfbyte.kernels.reference.linear"]
    monkeypatch.setattr(module, "dequantize", lambda *args: pytest.fail("a weight was decoded"))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = torch.ops.halfbyte.linear(*q.packed(), 96, torch.empty(2, 0, 64, dtype=dtype), None)
        assert y.shape == (2, 0, 96) and y.dtype == dtype
