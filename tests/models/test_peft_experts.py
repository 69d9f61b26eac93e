"""peft's LoRA on packed experts (`target_parameters`): peft's own numbers, without its dense copy of every expert."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb

from .conftest import IDS
from .test_experts import FAMILIES, eager

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 40  # both ways round a few times in each of about twenty layers, at different places


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory):
    """A family's dense model folder, every parameter random."""
    import transformers

    made = {}

    def folder(family):
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, f"{family}Config")(**FAMILIES[family])
            )
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return folder


def load(folder):
    return hb.load_model(folder, quantization=hb.HalfbyteConfig(block_size=32))


def decoded(model):
    """The same numbers, dense, on transformers' loop: what peft has to do with as it is."""
    twin = eager(model)
    twin.dequantize()
    return twin


def adapt(base, parameters, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, LoraConfig(target_parameters=parameters, **options))
    randomize(model)
    return model


def randomize(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)


def wrappers(model):
    return [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]


def measure(model, ids=IDS):
    logits = model(ids).logits
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    return logits.detach(), torch.autograd.grad(logits.square().mean(), trained)


def check_same(found, expected):
    (logits, grads), (their_logits, their_grads) = found, expected
    assert (logits - their_logits).norm() <= ROUNDINGS * EPS * their_logits.norm()
    for ours, theirs in zip(grads, their_grads, strict=True):
        assert ours.any() and (ours - theirs).norm() <= ROUNDINGS * EPS * theirs.norm()


@pytest.mark.parametrize("ids", [IDS, IDS[:1, :1]], ids=["more rows than experts", "fewer"])
@pytest.mark.parametrize("parameters", [[UP], [DOWN], [UP, DOWN]], ids=["up", "down", "both"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_logits_and_gradients_are_pefts(folder_with, family, parameters, ids):
    base = load(folder_with(family))
    twin = adapt(decoded(base), parameters)
    model = adapt(base, parameters)
    expected, found = measure(twin, ids), measure(model, ids)
    logits, grads = found
    assert (logits - expected[0]).norm() <= ROUNDINGS * EPS * expected[0].norm()
    for ours, theirs in zip(grads, expected[1], strict=True):
        # One token has no other to attend to: the gradient of its queries is 0 up to the same roundings.
        assert (ours - theirs).norm() <= ROUNDINGS * EPS * max(theirs.norm(), 1e-3)
    assert len(wrappers(model)) == 2 * len(parameters) and not any(w.slower_because for w in wrappers(model))
    assert all(isinstance(w.get_param(), hb.QuantizedTensor) for w in wrappers(model))


def test_autograd_keeps_no_dense_experts(folder_with):
    """Without this a layer of experts costs 16 bits a weight again, and QLoRA saves nothing."""
    kept = {}
    for name in ("grouped", "eager"):
        model = adapt(load(folder_with("Mixtral")), [UP, DOWN])
        if name == "eager":
            model.base_model.model.set_experts_implementation("eager")
        experts = wrappers(model)[0].get_base_layer()
        one = min(experts.gate_up_proj[0].numel(), experts.down_proj[0].numel())
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            model(IDS[:1, :2])
        kept[name] = sum(t.numel() for t in saved if t.is_floating_point() and t.numel() >= one)
        assert {w.slower_because for w in wrappers(model)} == {
            "" if name == "grouped" else "the experts run transformers' loop"
        }
    # What is left of that size are A and B of all experts.
    assert kept["grouped"] * 3 < kept["eager"]


def test_several_adapters_and_none(folder_with):
    base = load(folder_with("Mixtral"))
    plain = base(IDS).logits
    models = [adapt(decoded(base), [UP, DOWN]), adapt(base, [UP, DOWN])]
    for model in models:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[UP, DOWN]))
        randomize(model)
        model.base_model.set_adapter(["default", "second"])
    check_same(measure(models[1]), measure(models[0]))
    with models[1].disable_adapter():
        assert torch.equal(models[1](IDS).logits, plain)
    assert wrappers(models[1])[0].slower_because == "adapters are switched off or merged"
    models[1].delete_adapter("second")
    models[1].set_adapter("default")
    assert not torch.equal(models[1](IDS).logits, plain)


def test_merge_and_unmerge(folder_with):
    base = load(folder_with("Mixtral"))
    model = adapt(base, [UP, DOWN]).eval()
    packed = {w.parameter_name: w.get_param().clone() for w in wrappers(model)[:2]}
    expected = model(IDS).logits
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert not any(isinstance(w.get_param(), hb.QuantizedTensor) for w in wrappers(model))
        assert (model(IDS).logits - expected).norm() <= ROUNDINGS * EPS * expected.norm()
        model.unmerge_adapter()
        assert all(w.get_param().same_bytes(packed[w.parameter_name]) for w in wrappers(model)[:2])
        assert torch.equal(model(IDS).logits, expected)
    wrappers(model)[0].lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        wrappers(model)[0].merge(safe_merge=True)
    assert isinstance(wrappers(model)[0].get_param(), hb.QuantizedTensor)
    wrappers(model)[0].lora_B["default"].weight.data[0, 0] = 0
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    assert not wrappers(merged)
    assert (merged(IDS).logits - expected).norm() <= ROUNDINGS * EPS * expected.norm()


def test_unload_gives_the_packed_model_back(folder_with):
    base = load(folder_with("Mixtral"))
    plain = base(IDS).logits
    model = adapt(base, [UP])
    model(IDS)
    assert torch.equal(model.unload()(IDS).logits, plain)


def test_adapters_are_files_of_stock_peft(folder_with, tmp_path):
    """Written here and read by peft over a dense model, and the other way."""
    base = load(folder_with("Mixtral"))
    dense = decoded(base)
    ours = adapt(copy.deepcopy(base), [UP, DOWN]).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS).logits).norm() <= ROUNDINGS * EPS * theirs(IDS).logits.norm()
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base, tmp_path / "theirs").eval()
    assert not any(w.slower_because for w in wrappers(again)) and len(wrappers(again)) == 4
    assert (again(IDS).logits - ours(IDS).logits).norm() <= ROUNDINGS * EPS * ours(IDS).logits.norm()


def test_gradient_checkpointing(folder_with):
    model = adapt(load(folder_with("Mixtral")), [UP, DOWN]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(IDS).logits.square().mean(), trained)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(IDS).logits.square().mean().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, expected, strict=True))


def test_what_peft_refuses_is_refused(folder_with):
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        adapt(load(folder_with("Mixtral")), [UP], lora_dropout=0.1)


def test_bfloat16_weights_and_float32_adapters(folder_with):
    """As in training: peft keeps the adapter in float32, and the product runs in the activations' dtype."""
    base = hb.load_model(folder_with("Qwen3Moe"), quantization=hb.HalfbyteConfig(block_size=32), dtype=torch.bfloat16)
    model = adapt(base, [UP, DOWN])
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    logits, grads = measure(model)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_a_linear_weight_named_as_a_parameter_is_that_module(folder_with, tmp_path):
    """So some modules keep their names in peft, see halfbyte.train.targets. The files are the same, and merge."""
    names = ["q_proj", "v_proj"]
    model = adapt(load(folder_with("GptOss")), [f"{name}.weight" for name in names], target_modules=[])
    module = adapt(load(folder_with("GptOss")), None, target_modules=names)
    expected = module(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert not any(layer.slower_because for layer in wrappers(model)) and len(wrappers(model)) == 4
    model.add_adapter("second", LoraConfig(r=2, target_modules=[], target_parameters=[f"{n}.weight" for n in names]))
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    plain = PeftModel.from_pretrained(decoded(load(folder_with("GptOss"))), tmp_path)
    assert (plain(IDS).logits - expected).norm() <= ROUNDINGS * EPS * expected.norm()
    model.set_adapter("default")
    model.merge_adapter()
    assert (model(IDS).logits - expected).norm() <= ROUNDINGS * EPS * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, expected)
