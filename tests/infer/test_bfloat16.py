"""bfloat16 logits: the engine's are no further from the exact ones than transformers' own, random models or trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.infer.network import make_network
from halfbyte.kernels import cpu
from halfbyte.kernels.cpu.decoder import NativeDecoder
from halfbyte.kernels.cpu.library import Native
from halfbyte.kernels.decoder import Cache
from halfbyte.kernels.reference.decoder import TorchDecoder
from halfbyte.models import HalfbyteConfig
from halfbyte.nn import Linear4bit

CONFIG = HalfbyteConfig(block_size=32, compute_dtype=torch.bfloat16)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
TRAINED = ("stories260K", "babyllama-105")
LENGTH = 90
HALF_UNIT = 2.0**-8  # the largest relative error of a rounding to bfloat16's 8 digits
# Two rms values over the same positions, each of about as many independent errors as there are hidden numbers: four
# standard deviations of their quotient.
SPREAD = 1 + 4 / math.sqrt(64)


@pytest.fixture(scope="module", params=[*FAMILIES, *TRAINED, "quickstart"])
def case(request, tmp_path_factory, tiny_tokenizer, make_model):
    """A model in bfloat16, tokens, transformers' logits, exact ones, and how far roundings may move these."""
    if request.param in TRAINED:
        folder = request.getfixturevalue("assets") / "models" / request.param
    elif request.param == "quickstart":
        folder = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
    else:
        folder = tmp_path_factory.mktemp(request.param)
        make_model(request.param, len(tiny_tokenizer), folder, dtype=torch.bfloat16)
    model = hb.load_model(folder, quantization=CONFIG, dtype=torch.bfloat16).eval()
    torch.manual_seed(5)
    ids = torch.randint(3, model.config.vocab_size, (1, LENGTH))
    exact = in_float64(hb.load_model(folder, quantization=CONFIG, dtype=torch.bfloat16).eval())
    with torch.inference_mode():
        theirs, true = model(ids).logits[0].double(), exact(ids).logits[0]
        disturb(exact)
        moved = rms(exact(ids).logits[0] - true)
    return model, ids[0].tolist(), theirs, true, moved


def in_float64(model):
    """The same numbers in float64, 4-bit weights decoded."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear4bit):
                dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                dense.weight = torch.nn.Parameter(module.weight.dequantize(torch.float32), requires_grad=False)
                dense.bias = module.bias
                setattr(parent, name, dense)
    return model.double()


def disturb(model):
    """Change each number that is rounded on the way through TorchDecoder by as much as rounding it could.

    Relative to the number, a rounding moves by anything up to HALF_UNIT where its digits begin with 1.0, and up to half
    of that where they end with 1.9, 0.72 of it in rms; here it is anything up to HALF_UNIT for all. Decoded weights are
    rounded as well. Queries and keys are rounded three times (product, angles, rotation), what attention gives twice
    (its shares, its sums), the sum that goes from layer to layer twice.
    """

    def noise(x, count):
        for _ in range(count):
            x = x * (1 + (2 * torch.rand_like(x) - 1) * HALF_UNIT)
        return x

    outputs = {"q_proj": 3, "k_proj": 3, "layer": 2, "rotary_emb": 0}
    inputs = {"o_proj": 2, "down_proj": 1}
    for name, module in model.named_modules():
        parent, _, kind = name.rpartition(".")
        if parent.endswith("layers"):
            kind = "layer"
        elif list(module.children()):
            continue
        if kind.endswith("_proj"):
            module.weight.data = noise(module.weight.data, 1)
        if count := outputs.get(kind, 1):
            module.register_forward_hook(lambda _, __, output, count=count: noise(output, count))
        if count := inputs.get(kind, 0):
            module.register_forward_pre_hook(lambda _, given, count=count: (noise(given[0], count),))


def rms(x):
    return float(x.square().mean().sqrt())


def logits_of(decoder, ids, pieces):
    found, begin = [], 0
    for count in pieces:
        found.append(decoder.step(ids[begin : begin + count], [0] * count, list(range(begin, begin + count))))
        begin += count
    return torch.cat(found).double()


@pytest.mark.parametrize("pieces", [[LENGTH], [50, 40], [1] * LENGTH, [33, 2, 1, *[6] * 9]], ids=lambda p: str(p[:3]))
@pytest.mark.parametrize("kind", ["prompts", "steps"])
def test_logits_are_as_near_the_exact_ones_as_transformers(case, kind, pieces):
    """`kind`: torch operations over prompts, or the native step; in one piece, in a few, or token by token."""
    model, ids, theirs, true, moved = case
    network = make_network(model, LENGTH, torch.bfloat16)
    cache = Cache.empty(network, 1, torch.bfloat16)
    if kind == "prompts":
        decoder = TorchDecoder(network, cache, torch.bfloat16)
    else:
        native = cpu.native_library()
        if not isinstance(native, Native):
            pytest.skip("there is no native library")
        decoder = NativeDecoder(native, network, cache, torch.bfloat16)
    ours = logits_of(decoder, ids, pieces)
    apart = rms(ours - true)
    assert 0 < apart < rms(theirs - true) * SPREAD
    assert apart < moved
    assert rms(ours - theirs) < (apart + rms(theirs - true)) * (1 + 1e-9)
