"""Which parameters are quantized: by shape and role, nothing skipped in silence, nothing replaced on failure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import FormatError, RequestError
from halfbyte.formats import QuantSpec
from halfbyte.nn import make_plan


class Conv1D(nn.Module):
    """GPT-2's: a linear layer with its weight stored as [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 33))

    def forward(self, x, expert=1):
        return nn.functional.linear(x, self.gate_up_proj[expert])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 33)
        self.up = nn.Linear(33, 40)
        self.conv = Conv1D(33, 40)
        self.experts = Experts()
        self.norm = nn.LayerNorm(10)
        self.patch = nn.Conv2d(1, 2, 3)

    def forward(self, index):
        return self.norm(self.experts(self.conv(self.up(self.embed(index)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(10, 20, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, index):
        return self.lm_head(self.model(index))


CHOSEN = {
    "model.up.weight": "linear",
    "model.conv.weight": "conv1d",
    "model.experts.gate_up_proj": "experts",
}
SKIPPED = {
    "model.embed.weight": "embedding",
    "model.patch.weight": "Conv2d of 2x1x3x3",
    "lm_head.weight": "output layer",
}


def test_every_parameter_is_chosen_or_skipped_with_a_reason():
    """Trap 9: 3-D experts are no nn.Linear; norms and biases need no line."""
    plan = make_plan(Model(), heads=["lm_head"])
    assert plan.chosen == CHOSEN and plan.skipped == SKIPPED


def test_embeddings_when_asked_for():
    plan = make_plan(Model(), heads=["lm_head"], quantize_embeddings=True)
    assert plan.chosen == {**CHOSEN, "model.embed.weight": "embedding"}


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["up"], {"model.up.weight"}),
        (["model.experts"], {"model.experts.gate_up_proj"}),
        (["model.up.weight"], {"model.up.weight"}),
        (["model"], set(CHOSEN)),
        (["lm_head", "embed"], set()),
    ],
)
def test_names_to_skip(skip, kept):
    plan = make_plan(Model(), skip=skip, heads=["lm_head"])
    assert set(CHOSEN) - set(plan.chosen) == kept
    assert all(plan.skipped[name] == "asked for" for name in kept)


@pytest.mark.parametrize(("wrong", "hint"), [("expert", "'experts'"), ("model.conf", "'conv'"), ("up_proj", "up")])
def test_a_name_that_skips_nothing_is_an_error(wrong, hint):
    """A part of a name does not match: skipping 'up' must not skip 'gate_up_proj'."""
    with pytest.raises(RequestError, match=f"nothing in the model is called '{wrong}'.*{hint}"):
        make_plan(Model(), skip=["conv", wrong])


def test_quantize_model_equals_a_model_with_decoded_weights():
    model = Model()
    spec = QuantSpec("nf4", 32, 8)
    index = torch.arange(6)
    expected = Model()
    expected.load_state_dict(model.state_dict())
    for name, kind in CHOSEN.items():
        weight = expected.get_parameter(name).data
        dense = weight.T if kind == "conv1d" else weight  # blocks run along the inputs of a product, as everywhere
        decoded = hb.quantize(dense, "nf4", 32, 8).dequantize()
        weight.copy_(decoded.T if kind == "conv1d" else decoded)
    report = hb.quantize_model(model, spec)
    assert type(model.model.conv) is hb.Linear4bit and model.model.conv.weight.shape == (33, 40)
    assert type(model.model.experts.gate_up_proj) is hb.QuantizedTensor
    # addmm and linear add the bias at different moments: two roundings of sums up to 40 products, four layers.
    assert torch.allclose(model(index), expected(index), rtol=0, atol=40 * 4 * 2**-23 * 20)
    sizes = {name: parameter.numel() for name, parameter in expected.named_parameters()}
    assert report.quantized == sum(sizes[name] for name in CHOSEN) and report.total == sum(sizes.values())
    assert report.skipped == SKIPPED and report.share == report.quantized / report.total
    assert report.quantized_nbytes == sum(model.get_parameter(n).nbytes for n in CHOSEN if n != "model.conv.weight") + (
        model.model.conv.weight.nbytes
    )
    assert report.nbytes == report.quantized_nbytes + 4 * (report.total - report.quantized)
    assert f"quantized {100 * report.share:.1f} % of {report.total:,} parameters" in str(report)
    assert "model.patch.weight (Conv2d of 2x1x3x3)" in str(report)


def test_a_tied_head_stays_tied_and_unquantized():
    """Trap 6, and the tied table counts once."""
    model = Model()
    model.lm_head = nn.Linear(33, 20, bias=False)
    model.lm_head.weight = model.model.embed.weight
    report = hb.quantize_model(model)
    assert model.lm_head.weight is model.model.embed.weight
    assert type(model.lm_head) is nn.Linear and type(model.lm_head.weight) is nn.Parameter
    assert report.total == sum(parameter.numel() for parameter in model.parameters())


def test_nothing_is_replaced_when_a_weight_is_bad():
    model = Model()
    with torch.no_grad():
        model.model.experts.gate_up_proj[2, 3, 4] = float("inf")
    with pytest.raises(FormatError, match=r"model\.experts\.gate_up_proj: the weight holds NaN or Inf"):
        hb.quantize_model(model)
    assert type(model.model.up) is nn.Linear and type(model.model.conv) is Conv1D


def test_a_second_time_changes_nothing():
    model = Model()
    hb.quantize_model(model)
    before = model.model.up.weight.clone()
    report = hb.quantize_model(model)
    assert model.model.up.weight.same_bytes(before) and report.quantized > 0


def test_what_is_quantized_is_frozen_and_the_rest_is_not():
    model = Model()
    hb.quantize_model(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "lm_head.weight" in trainable and "model.norm.weight" in trainable
    assert not trainable & {*CHOSEN, "model.up.bias", "model.conv.bias"}
    model(torch.arange(3)).sum().backward()
    assert model.model.embed.weight.grad is not None  # the gradient passes through every quantized layer


def test_the_plan_needs_no_memory():
    with torch.device("meta"):
        model = Model()
    assert make_plan(model, heads=["lm_head"]).chosen == CHOSEN
