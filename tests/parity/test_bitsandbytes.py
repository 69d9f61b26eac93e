"""Bit for bit with bitsandbytes 0.50: codes, scales, second level, decoded values, and model folders both ways.

Two defects of its CPU library decide what is compared with what. (1) Its AVX512 dequantization takes wrong scales
where a row's length is not a multiple of the block size: of (128, 352) at block 64, nine values in ten differ from
its own generic implementation's. (2) Its AVX512-BF16 conversion flushes subnormal results to zero. So decoded values
are compared with its native op where rows are whole blocks (or the tensor is one row) and nothing is subnormal, and
with bitsandbytes' generic implementation, written in torch, everywhere.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo

import halfbyte as hb
from halfbyte.tensor import flatten, unflatten

bnb = pytest.importorskip("bitsandbytes")
import bitsandbytes.functional as F  # noqa: E402
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute  # noqa: E402

# Its generic implementation is wrapped in torch.compile, which could contract a product and a rounding; this is the
# plain function.
GENERIC = _dequantize_4bit_compute.__wrapped__

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [(1,), (63,), (64,), (65,), (7, 3), (127, 129), (4096, 64)]


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """Its native op falls back to the generic one, compiled, for odd rows and large blocks: seconds a shape."""
    with torch._dynamo.config.patch(disable=True):
        yield


def sample(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal weights; with a block of zeros, with outliers of 1e4, or with denormals in it."""
    torch.manual_seed(1)
    w = torch.randn(shape)
    flat = w.view(-1)
    if kind == "zeros":
        flat[: max(1, flat.numel() // 2)] = 0
    elif kind == "outliers":
        flat[:: max(1, flat.numel() // 7)] = 1e4
    elif kind == "denormals":
        flat[: max(1, flat.numel() // 2)] *= 1e-40 if dtype != torch.float16 else 1e-6
        flat[-1] = 1e-39
    return w.to(dtype)


def generic_dequantize(codes: torch.Tensor, state) -> torch.Tensor:
    """bitsandbytes' dequantization in its own torch code."""
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = codes.view(torch.uint8).reshape(-1)
    return GENERIC(flat, absmax, state.code, state.blocksize, state.shape, state.dtype)


def native_is_right(shape: tuple[int, ...], block: int, decoded: torch.Tensor) -> bool:
    """Where neither of the two defects shows."""
    whole_rows = len(shape) == 1 or shape[-1] % block == 0
    tiny = torch.finfo(decoded.dtype).tiny
    return whole_rows and not ((decoded != 0) & (decoded.abs() < tiny)).any()


def check_against(w: torch.Tensor, format: str, block: int, nested: bool) -> None:
    codes, state = F.quantize_4bit(w, blocksize=block, quant_type=format, compress_statistics=nested)
    ours = hb.quantize(w, format, block, 8 if nested else None)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.scales, state.absmax)
    if nested:
        assert torch.equal(ours.scale_absmax, state.state2.absmax) and torch.equal(ours.scale_offset, state.offset)
    decoded = ours.dequantize()
    assert decoded.dtype == w.dtype
    assert torch.equal(decoded.view(-1), generic_dequantize(codes, state).view(-1))
    if native_is_right(tuple(w.shape), block, decoded):
        # 1-D results come back as (1, n).
        assert torch.equal(decoded.view(-1), F.dequantize_4bit(codes, state).view(-1))


@pytest.mark.parametrize("kind", ["normal", "zeros", "outliers", "denormals"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_scales_and_values_are_equal(format, shape, kind):
    """All block sizes, dtypes, with and without a second level."""
    blocks = BLOCKS if kind == "normal" else [32, 64, 4096]
    for dtype in DTYPES:
        w = sample(kind, shape, dtype)
        for block in blocks:
            for nested in (False, True):
                check_against(w, format, block, nested)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_million_weights_and_more_than_one_second_level_block(format, dtype):
    """65,536 scales; heavy tails put many weights next to a threshold."""
    w = torch.randn(1024, 1024).div(torch.rand(1024, 1024).add(0.05)).to(dtype)
    for block in (32, 128):
        check_against(w, format, block, nested=True)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_more_scales_than_torch_sums_with_one_thread(format):
    """The mean of so many depends on the threads in bitsandbytes; ours is that of one, whatever torch is set to."""
    w, before = torch.randn(2_500_001), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ours = hb.quantize(w, format, 64, 8)
        torch.set_num_threads(1)
        codes, state = F.quantize_4bit(w, blocksize=64, quant_type=format, compress_statistics=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.scale_absmax, state.state2.absmax) and torch.equal(ours.scale_offset, state.offset)


def test_its_native_op_is_compared_at_all():
    """The condition above must not quietly leave nothing to compare."""
    assert native_is_right((4096, 64), 64, torch.ones(1)) and native_is_right((65,), 64, torch.ones(1))
    assert not native_is_right((128, 352), 64, torch.ones(1))
    assert not native_is_right((64,), 64, torch.full((1,), 1e-39))


@pytest.mark.parametrize("shape", [(128, 352), (4096, 64)], ids=str)
def test_rows_that_are_not_whole_blocks_take_the_scale_of_their_own_block(shape):
    """Where the native op of 0.50.2 takes another block's scale, its generic one and the definition agree with us."""
    w = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]
    codes, state = F.quantize_4bit(w, blocksize=128, quant_type="nf4")
    ours = hb.quantize(w, "nf4", 128, None)
    assert torch.equal(ours.dequantize(), generic_dequantize(codes, state))
    by_hand = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)
    values = ours.spec.codebook.table()[by_hand.int()] * state.absmax.repeat_interleave(128)[: w.numel()]
    assert torch.equal(ours.dequantize().view(-1), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subnormal_results_are_kept(dtype):
    """Where the native bfloat16 conversion of 0.50.2 writes zeros, its generic one and the definition agree with us."""
    w = (torch.randn(64) * torch.finfo(dtype).tiny / 4).to(dtype)
    codes, state = F.quantize_4bit(w, quant_type="nf4")
    decoded = hb.quantize(w, "nf4", 64, None).dequantize()
    assert torch.equal(decoded, generic_dequantize(codes, state).view(-1))
    assert ((decoded != 0) & (decoded.abs() < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_keys_in_a_file_are_its_own(format, nested):
    """Name for name, dtype for dtype, shape for shape, byte for byte; the description as JSON."""
    w = torch.randn(127, 129).bfloat16()
    codes, state = F.quantize_4bit(w, quant_type=format, compress_statistics=nested)
    theirs = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()} | {"m.weight": codes}
    ours = flatten("m.weight", hb.quantize(w, format, 64, 8 if nested else None))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if ".quant_state." in key:
            assert json.loads(bytes(ours[key].numpy())) == json.loads(bytes(value.numpy()))
        else:
            assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key
    assert unflatten("m.weight", theirs).same_bytes(hb.quantize(w, format, 64, 8 if nested else None))
    again = F.QuantState.from_dict({k.removeprefix("m.weight."): v for k, v in ours.items() if k != "m.weight"}, "cpu")
    assert torch.equal(generic_dequantize(ours["m.weight"], again), unflatten("m.weight", ours).dequantize())


# -------------------------------------------------------------------------------------------------------- model folders
MODELS = ["stories260K", "babyllama-105"]
# More rows than our float32 kernels take: both then multiply by torch's GEMM, and logits are equal to the bit.
IDS = (torch.arange(144) % 100 + 3).view(2, 72)


@pytest.fixture
def stock_forward(monkeypatch, request):
    """Logits of a bitsandbytes model.

    In eval mode its CPU path repacks the weights and asserts on shapes not divisible by 32, so the model runs in train
    mode (no dropout in these). For babyllama-105, whose feed-forward width of 352 is no multiple of the block size, its
    native dequantization takes wrong scales: its matrix product, which is dequantize and linear, is given its own
    generic one. stories260K runs untouched.
    """

    def product(a, b, quant_state, out=None, bias=None):
        return torch.nn.functional.linear(a, generic_dequantize(b, quant_state).to(a.dtype), bias)

    if "babyllama" in request.node.name:
        monkeypatch.setattr(bnb, "matmul_4bit", product)

    def forward(model) -> torch.Tensor:
        with torch.no_grad():
            return model.train()(IDS).logits

    return forward


def bitsandbytes_config(format: str, nested: bool):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=nested)


def four_bit_layers(model) -> int:
    return sum(type(module) is bnb.nn.Linear4bit for module in model.modules())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_saved_here_loads_in_stock_transformers(assets, tmp_path, stock_forward, name, format, nested):
    from transformers import AutoModelForCausalLM

    model = hb.load_model(
        assets / "models" / name, quantization=hb.HalfbyteConfig(format, 64, 8 if nested else None), dtype=torch.float32
    )
    hb.save_model(model, tmp_path / "here")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "here", dtype=torch.float32)
    assert four_bit_layers(stock) == 35 and not any(isinstance(p, hb.QuantizedTensor) for p in stock.parameters())
    assert torch.equal(stock_forward(stock), model(IDS).logits)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_saved_there_loads_here(assets, tmp_path, stock_forward, name, format, nested):
    from transformers import AutoModelForCausalLM

    source = assets / "models" / name
    config = bitsandbytes_config(format, nested)
    stock = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    assert four_bit_layers(stock) == 35
    stock.save_pretrained(tmp_path / "there")
    model = hb.load_model(tmp_path / "there")
    assert torch.equal(model(IDS).logits, stock_forward(stock))
    ours = hb.load_model(source, quantization=hb.HalfbyteConfig(format, 64, 8 if nested else None), dtype=torch.float32)
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, hb.QuantizedTensor)}
    assert len(weights) == 35 and all(p.same_bytes(ours.get_parameter(n)) for n, p in weights.items())


def test_bitsandbytes_is_not_needed_to_read_its_folders(assets, tmp_path):
    """In a process where importing it fails."""
    import subprocess
    import sys

    model = hb.load_model(assets / "models" / "stories260K", quantization=hb.HalfbyteConfig())
    hb.save_model(model, tmp_path / "here")
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import halfbyte as hb; print(hb.load_model(sys.argv[1]).halfbyte_report.quantized)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "here")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == model.halfbyte_report.quantized
