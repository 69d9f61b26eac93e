"""Plain peft on a 4-bit model: the dispatcher, every option, merging, and adapters that stock peft reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(folder_of):
    return hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32))


def adapt(base, seed: int = 0, **options):
    """A peft model whose adapters change something: B starts at random instead of at zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, LoraConfig(**options))
    randomize(model, seed)
    return model.eval()


def randomize(model, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def lora_layers(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "LoraLinear4bit"}


def packed(model) -> dict[str, hb.QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, hb.QuantizedTensor)}


def test_every_target_becomes_our_layer_over_the_same_bytes(base):
    before = {name: weight.clone() for name, weight in packed(base).items()}
    layers = lora_layers(adapt(base))
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        assert weight.same_bytes(before[name.removeprefix("base_model.model.") + ".weight"])


def test_a_dense_model_keeps_pefts_own_layers(folder_of):
    model = adapt(hb.load_model(folder_of("llama")))
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_gradients_reach_the_adapter_and_nothing_else(base, ids, options):
    model = adapt(base, **options).train()
    before = {name: weight.clone() for name, weight in packed(model).items()}
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            assert parameter.requires_grad and parameter.grad is not None and parameter.grad.any(), name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
    assert all(weight.same_bytes(before[name]) for name, weight in packed(model).items())


def test_a_rank_pattern_is_kept(base):
    layers = lora_layers(adapt(base, rank_pattern={"q_proj": 2}))
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in layers.items()}
    assert ranks == {**dict.fromkeys(ALL, 4), "q_proj": 2}


def test_the_forward_is_base_plus_delta(base, ids):
    """Against its definition: y = x W^T + (alpha / r) x A^T B^T, W decoded."""
    layer = lora_layers(adapt(base))["base_model.model.model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.get_base_layer().weight.dequantize().T + 2 * (x @ a.T @ b.T)
    # Sums of 32 products in another order: 32 eps of the sum of magnitudes, which stays below 64 here.
    assert torch.allclose(layer(x), expected, rtol=0, atol=32 * 2**-23 * 64)


def test_dropout_is_applied_to_the_adapter_only(base, ids):
    """Trap 10: fast paths elsewhere assume no dropout and switch it off in silence."""
    model = adapt(base, lora_dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_disabling_gives_the_base_back(base, ids):
    plain = base(ids).logits
    model = adapt(base)
    assert not torch.equal(model(ids).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)


def test_two_adapters_and_switching(base, ids):
    model = adapt(base)
    first = model(ids).logits
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter, std=0.1)
    second = model(ids).logits
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    mixed = model(ids, adapter_names=["default", "second"]).logits  # one adapter a row
    for row, alone in enumerate((first, second)):
        # Another batch size is another order of summing: 1e-5 of logits around 1, over two layers of sums of 32 to 48.
        assert torch.allclose(mixed[row], alone[row], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ merging
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_adds_in_float32_to_the_decoded_weight_and_rounds_once(folder_of, ids, dtype, safe):
    """Trap 3: the base is the decoded weight, and adding in bfloat16 loses low bits."""
    base = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32), dtype=dtype)
    model = adapt(base)
    before = {name: weight.clone() for name, weight in packed(model).items()}
    layers = lora_layers(model)
    expected = {
        name: (layer.get_base_layer().weight.dequantize(torch.float32) + layer.get_delta_weight("default").float()).to(
            dtype
        )
        for name, layer in layers.items()
    }
    logits = model(ids).logits
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers.items():
        merged = layer.get_base_layer().weight
        assert type(merged.data) is torch.Tensor and merged.dtype == dtype and torch.equal(merged, expected[name])
    if dtype == torch.float32:
        assert torch.allclose(model(ids).logits, logits, rtol=1e-4, atol=1e-4)  # reordered sums, two layers
    model.unmerge_adapter()
    assert all(weight.same_bytes(before[name]) for name, weight in packed(model).items())
    assert len(packed(model)) == len(before) and torch.equal(model(ids).logits, logits)


def test_a_merge_that_is_not_finite_changes_nothing(base, ids):
    model = adapt(base)
    layer = next(iter(lora_layers(model).values()))
    before = layer.get_base_layer().weight.clone()
    layer.lora_B["default"].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert layer.get_base_layer().weight.same_bytes(before)


def test_two_adapters_merge_one_after_the_other(base):
    model = adapt(base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM"))
    randomize(model, 1)
    layer = next(iter(lora_layers(model).values()))
    before = layer.get_base_layer().weight.clone()
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert torch.equal(layer.get_base_layer().weight, before.dequantize() + deltas[0] + deltas[1])
    layer.unmerge()
    assert layer.get_base_layer().weight.same_bytes(before)


def test_merge_and_unload_is_a_dense_model(base, ids, tmp_path):
    model = adapt(base)
    logits = model(ids).logits
    merged = model.merge_and_unload()
    assert not packed(merged) and not lora_layers(merged)
    assert torch.allclose(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)  # reordered sums, two layers


# ---------------------------------------------------------------------------------------------------------- ecosystem
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_adapter_loads_in_stock_peft_on_the_decoded_model(base, folder_of, ids, tmp_path, options):
    from transformers import AutoModelForCausalLM

    model = adapt(base, **options)
    model.save_pretrained(tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(folder_of("llama")).eval()
    for name, weight in packed(
        hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32))
    ).items():
        dense.get_parameter(name).data.copy_(weight.dequantize())
    stock = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    assert not lora_layers(stock)
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_an_adapter_comes_back_onto_the_packed_model(base, folder_of, ids, tmp_path):
    model = adapt(base)
    model.save_pretrained(tmp_path / "adapter")
    fresh = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32))
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert len(lora_layers(again)) == 14 and torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_keeps_base_plus_adapter(base, init):
    """They take the adapter's start out of the base weight; lost there, every product would be off by it.

    What remains is quantized again: base + delta lies within half a gap of the codebook, times the block's scale, of
    what it was.
    """
    before = {name: weight.dequantize() for name, weight in packed(base).items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ALL, init_lora_weights=init))
    for name, layer in lora_layers(model).items():
        weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
        assert isinstance(weight, hb.QuantizedTensor) and not weight.requires_grad and delta.any()
        error = (weight.dequantize() + delta - before[name.removeprefix("base_model.model.") + ".weight"]).abs()
        half_gap = weight.spec.codebook.table().diff().max() / 2
        largest = weight.dequantize().abs().max()
        assert error.max() <= half_gap * largest * 1.02 + 1e-5
        # 1.02: the scales' own rounding, 0.9 / 128 of their spread, with the weight's.


def test_loftq_on_packed_weights_is_refused_with_the_way_to_do_it(base):
    """peft would compute an error of zero there, and an adapter of two zero factors never learns."""
    before = {name: weight.clone() for name, weight in packed(base).items()}
    options = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=4)}
    with pytest.raises(hb.HalfbyteError, match="init_loftq"):
        get_peft_model(base, LoraConfig(r=4, target_modules=ALL, **options))
    assert all(weight.same_bytes(before[name]) for name, weight in packed(base).items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_init_loftq_takes_quantization_error_away(folder_of, ids, family):
    """The adapter's product is the best rank-r approximation of the error: logits move towards the original's."""
    folder = folder_of(family)
    base = hb.load_model(folder, quantization=hb.HalfbyteConfig(format="int4", block_size=256))
    dense = hb.load_model(folder)
    with torch.no_grad():
        wanted, plain = dense(input_ids=ids).logits, base(input_ids=ids).logits
        model = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", use_rslora=True))
        packed_before = {name: weight.clone() for name, weight in packed(model).items()}
        share = hb.init_loftq(model, folder)
        better = model.eval()(input_ids=ids).logits
    assert 0.3 < share < 1
    assert (better - wanted).square().sum() < (plain - wanted).square().sum()
    assert all(weight.same_bytes(packed_before[name]) for name, weight in packed(model).items())
    with pytest.raises(hb.HalfbyteError, match="no adapter 'other'"):
        hb.init_loftq(model, folder, "other")
    with pytest.raises(hb.HalfbyteError, match="not the"):
        hb.init_loftq(model, folder_of("gpt2" if family == "llama" else "llama"))


@pytest.mark.filterwarnings("ignore:.*eva")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_leaves_the_base_alone_changes_no_byte(base, init):
    before = {name: weight.clone() for name, weight in packed(base).items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ALL, init_lora_weights=init))
    for name, layer in lora_layers(model).items():
        assert layer.get_base_layer().weight.same_bytes(before[name.removeprefix("base_model.model.") + ".weight"])


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "bert"])
def test_other_families(folder_of, ids, family):
    task = "encoder" if family == "bert" else "causal-lm"
    base = hb.load_model(folder_of(family), task=task, quantization=hb.HalfbyteConfig(block_size=32))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear" if family != "bert" else ["query"]))
    assert lora_layers(model)
    randomize(model)
    model(ids)[0].sum().backward()
    assert all(layer.lora_A["default"].weight.grad.any() for layer in lora_layers(model).values())


def test_gradient_checkpointing_reaches_the_adapter(base, ids):
    """Trap 11: a frozen embedding gives no gradient unless its output asks for one."""
    model = adapt(base).train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    for name, grad in expected.items():
        assert torch.equal(model.get_parameter(name).grad, grad), name


def test_prepare_model_for_kbit_training_casts_no_packed_byte(folder_of, ids):
    """Trap 12: peft writes `param.data = param.data.to(float32)` to every 16-bit parameter it does not know."""
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32), dtype=torch.bfloat16)
    before = {name: weight.codes.clone() for name, weight in packed(model).items()}
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    after = packed(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name].codes, before[name]) for name in before)
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_forward_is_pefts_forward(base, ids, dtype, monkeypatch):
    """The same logits and gradients with the fused path and without it, under autocast and not."""
    model = adapt(base.to(dtype))
    layer_class = type(next(iter(lora_layers(model).values())))

    def measure():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        return loss.detach(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    fused_loss, fused = measure()
    assert not any(layer.slower_because for layer in lora_layers(model).values())
    monkeypatch.setattr(layer_class, "_why_not_fused", lambda self, args, kwargs: "a test asks for it")
    loss, grads = measure()
    # Both round to the compute dtype a few times in each of about twenty layers, at different places.
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused_loss, loss, rtol=tolerance, atol=0)
    for ours, theirs in zip(fused, grads, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_slower_path_says_why(base, ids):
    """Trap 10: a fast path that switches itself off silently."""
    model = adapt(base, lora_bias=True)
    model(ids)
    assert {layer.slower_because for layer in lora_layers(model).values()} == {"the adapter is a variant or has a bias"}
