"""Adapted projections that read one tensor: which are computed together, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.models import shared_input
from halfbyte.models.shared_input import SharedInput, project

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2


@pytest.fixture
def make_model(folder_of):
    """An adapted 4-bit model in training mode, whose B are not zero."""

    def make(family="llama", **options):
        base = hb.load_model(folder_of(family), quantization=hb.HalfbyteConfig(block_size=32))
        options = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


@pytest.fixture
def groups(monkeypatch):
    """The numbers of layers that were computed together, in order."""
    seen = []

    def counting(x, layers):
        seen.append(len(layers))
        return lora_linears(x, layers)

    lora_linears = shared_input.lora_linears
    monkeypatch.setattr(shared_input, "lora_linears", counting)
    return seen


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, ids, monkeypatch):
    """As with every layer called by itself: float32 sums in another order."""
    loss, gradients = step(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(shared_input, "lora_linears", None)
        patch.setattr("halfbyte.models.lora_layer.LoraLinear4bit.shared", lambda self, x: None)
        wanted, wanted_gradients = step(model, ids)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and gradients
    for name, gradient in gradients.items():
        difference = (gradient - wanted_gradients[name]).norm()
        assert difference <= 1e-5 * wanted_gradients[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attention_and_mlp_are_two_operations_a_layer(make_model, groups, ids, family, monkeypatch):
    model = make_model(family)
    assert_same_step(model, ids, monkeypatch)
    assert groups == [3, 2] * LAYERS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, [2] * LAYERS),
        ({"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}}, [3, 2] * LAYERS),
        ({"lora_dropout": 0.3}, []),
        ({"use_dora": True}, []),
        ({"layers_to_transform": [1]}, [3, 2]),
        ({"target_modules": ["o_proj"]}, []),
    ],
    ids=str,
)
def test_what_is_computed_together(make_model, groups, ids, options, expected, monkeypatch):
    model = make_model(**options)
    if "lora_dropout" in options:
        step(model, ids)
    else:
        assert_same_step(model, ids, monkeypatch)
    assert groups == expected


def test_adapters_in_another_dtype_and_frozen_ones(make_model, groups, ids, monkeypatch):
    model = make_model()
    for name, parameter in model.named_parameters():
        if "q_proj.lora" in name:
            parameter.data = parameter.data.bfloat16()
        if "gate_proj.lora_A" in name or "v_proj.lora" in name:
            parameter.requires_grad_(False)
    loss, gradients = step(model, ids)
    assert groups == [3, 2] * LAYERS and loss.isfinite()
    assert not any("v_proj" in name or "gate_proj.lora_A" in name for name in gradients)
    assert any("q_proj" in name for name in gradients) and any("gate_proj.lora_B" in name for name in gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_model, groups, ids, reentrant):
    model = make_model()
    loss, gradients = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    groups.clear()
    again, checkpointed = step(model, ids)
    assert len(groups) == 2 * 2 * LAYERS and again == loss  # forward and recomputation
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in gradients.items())


def test_a_layer_that_somebody_listens_to_is_called(make_model, groups, ids):
    model = make_model()
    heard = []
    attention = model.base_model.model.model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: heard.append(output))
    step(model, ids)
    assert len(heard) == 1 and groups == [2, 2, 3, 2]
    handle.remove()
    attention.k_proj.forward = lambda x: heard.append(x) or type(attention.k_proj).forward(attention.k_proj, x)
    groups.clear()
    step(model, ids)
    assert len(heard) == 2 and groups == [2, 2, 3, 2]


def test_adapters_that_are_off_merged_or_several(make_model, groups, ids):
    model = make_model()
    with model.disable_adapter():
        model(input_ids=ids)
    model.merge_adapter()
    model(input_ids=ids)
    model.unmerge_adapter()
    assert groups == []
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    model(input_ids=ids)
    assert groups == []
    model.eval()
    model.set_adapter("default")
    model(input_ids=ids)
    assert groups == []


def test_layers_of_unlike_dtypes_are_called_one_by_one(groups):
    class Layer(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def shared(self, x):
            return self.dtype, x.dtype, None

        def forward(self, x):
            return x + 1

    x = torch.ones(2)
    assert [y.tolist() for y in project(x, [Layer(torch.float32), Layer(torch.bfloat16)])] == [[2, 2], [2, 2]]
    assert groups == []


def test_only_calls_with_the_very_same_tensor_share():
    """A cross attention reads two tensors; a layer that is called twice is computed twice."""
    attention = nn.Module()
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(4, n) for n in (4, 2, 3))
    attention.scaling = 0.25
    x, other = torch.randn(5, 4), torch.randn(5, 4)
    one = SharedInput(attention)
    assert one.scaling == 0.25 and one.training
    calls = (("q_proj", x), ("k_proj", other), ("k_proj", x), ("k_proj", x), ("v_proj", x), ("q_proj", other))
    for layer, read in calls:
        assert torch.equal(getattr(one, layer)(read), getattr(attention, layer)(read))
    with pytest.raises(AttributeError, match="missing"):
        _ = one.missing


def test_a_copy_of_a_model_shares_nothing_with_it(make_model, groups, ids):
    model = make_model()
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert step(twin, ids)[0] != step(model, ids)[0]
    assert groups == [3, 2] * LAYERS * 2
