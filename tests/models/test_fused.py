"""transformers' modules with halfbyte's operations: which are covered, equal numbers, and the way back."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model

import halfbyte as hb
from halfbyte.models.fused import fuse
from halfbyte.nn.parts import PARTS

LLAMAS = ("llama", "llama-tied", "qwen2", "qwen3")


@pytest.fixture
def make_model(folder_of):
    """A family's model as transformers loads it."""

    def make(family):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32)

    return make


def loss_and_gradients(model, ids, **kwargs):
    """With trained input embeddings, so that the gradient goes through every layer."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, **kwargs)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("family", "covered"),
    [
        ("llama", {"loss", "norm", "mlp", "rotary"}),
        ("llama-tied", {"loss", "norm", "mlp", "rotary"}),
        ("qwen2", {"loss", "norm", "mlp", "rotary"}),
        ("qwen3", {"loss", "norm", "mlp", "rotary"}),
        ("gemma", {"loss", "rotary"}),  # its norm adds one to the weight, its gate is GELU's
        ("mixtral", {"loss", "norm", "rotary"}),
        ("gpt2", set()),
        ("opt", set()),
    ],
)
def test_what_is_covered(make_model, family, covered):
    reasons = fuse(make_model(family))
    assert set(reasons) == set(PARTS)
    assert {part for part, reason in reasons.items() if not reason} == covered
    if "loss" not in covered:
        assert "ForCausalLM" in reasons["loss"] or "LMHead" in reasons["loss"]


@pytest.mark.parametrize("family", [*LLAMAS, "gemma", "mixtral"])
def test_a_step_is_the_plain_models(make_model, family, ids):
    """float32: sums in another order, some of them over the vocabulary; 1e-5 is 170 times its resolution.

    All weights but the norms are trained, so that their gradients too are compared.
    """
    plain = make_model(family).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" not in name)
    model = copy.deepcopy(plain)
    fuse(model)
    loss, gradients = loss_and_gradients(model, ids)
    wanted, wanted_gradients = loss_and_gradients(plain, ids)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, wanted_gradients[name]) < 1e-5, name


def test_a_trained_norm_gets_its_gradient(make_model, ids):
    model = make_model("llama").train()
    fuse(model)
    _, gradients = loss_and_gradients(model, ids)
    assert all(name in gradients for name, _ in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("family", LLAMAS)
def test_bfloat16_is_no_further_from_float32_than_the_plain_model(make_model, family, ids):
    exact = make_model(family).train()
    plain = copy.deepcopy(exact).bfloat16()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" not in name)
    model = copy.deepcopy(plain)
    fuse(model)
    wanted, wanted_gradients = loss_and_gradients(exact, ids)
    errors = []
    for one in (model, plain):
        loss, gradients = loss_and_gradients(one, ids)
        assert loss.item() == pytest.approx(wanted.item(), rel=0.05)
        errors.append(sum(relative(g.float(), wanted_gradients[n]) for n, g in gradients.items()) / len(gradients))
    # Another rounding is another sample of the same error: measured ratios are 0.8 to 1.1.
    assert errors[0] < 1.5 * errors[1]


def test_eval_mode_is_transformers_to_the_bit(make_model, ids):
    plain = make_model("qwen3").eval()
    model = copy.deepcopy(plain)
    fuse(model)
    got, wanted = model(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_routers_with_a_loss_of_their_own_get_it(make_model, family, ids):
    """In training, from the config or the call; a loss without logits that is asked for is that of the words."""
    if family == "deepseek":
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "n_group": 1}
        latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 0}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 24}
        plain = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **routed, **heads)).train()
    else:
        plain = make_model(family).train()
    model = copy.deepcopy(plain)
    fuse(model)
    output, wanted = model(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
    assert output.logits is None and type(output) is type(wanted)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    if family == "deepseek":
        return
    asked = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    both = plain(**asked)
    assert both.loss > wanted.loss
    for found in (model(**asked), (setattr(model.config, "output_router_logits", True), model(ids, labels=ids))[1]):
        assert torch.allclose(found.loss, both.loss, rtol=1e-5) and found.aux_loss is not None
    assert model(input_ids=ids, labels=ids).logits is not None
    words = model(input_ids=ids, labels=ids, skip_logits=True)
    assert words.logits is None and words.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert model(input_ids=ids, labels=ids, output_router_logits=False).logits is None


def test_logits_are_left_out_only_where_nobody_asks(make_model, ids):
    model = make_model("llama").train()
    fuse(model)
    assert model(input_ids=ids, labels=ids).logits is None
    assert model(input_ids=ids, labels=ids, skip_logits=False).logits is not None
    assert model(input_ids=ids).logits is not None
    assert model(input_ids=ids, labels=ids, logits_to_keep=0).logits is None
    assert model(ids, labels=ids).logits is not None  # by position: transformers' forward sorts it out
    loss = model(input_ids=ids, labels=ids, return_dict=False)
    assert isinstance(loss, tuple)
    assert loss[0].shape == ()
    model.eval()
    assert model(input_ids=ids, labels=ids).logits is not None
    assert model(input_ids=ids, labels=ids, skip_logits=True).logits is None


def test_divisor_ignored_and_shifted_labels(make_model, ids):
    plain = make_model("llama").train()
    model = copy.deepcopy(plain)
    fuse(model)
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = labels.roll(-1, 1)
    for kwargs in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}, {"shift_labels": shifted}):
        got = model(input_ids=ids, labels=labels, **kwargs).loss.item()
        assert got == pytest.approx(plain(input_ids=ids, labels=labels, **kwargs).loss.item(), rel=1e-5)


def test_a_head_that_is_more_than_a_product_is_called(make_model, ids):
    """An adapter, a hook, a packed weight: each would be passed over where only the weight is looked at."""
    model = make_model("llama").train()
    fuse(model)
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 0)
    uniform = pytest.approx(torch.tensor(96.0).log().item(), rel=1e-5)
    assert model(input_ids=ids, labels=ids).loss.item() == uniform
    hook.remove()
    assert model(input_ids=ids, labels=ids).loss.item() != uniform
    last = torch.tensor([5, 6])
    assert model(input_ids=ids, logits_to_keep=last).logits.shape[1] == 2
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_" in n)


def test_a_loss_of_the_users_own_is_called(make_model, ids):
    model = make_model("llama").train()
    fuse(model)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    assert model(input_ids=ids, labels=ids).loss.item() == 7


def test_load_model_fuses_and_can_be_told_not_to(folder_of, ids):
    model = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig())
    assert not any(model.halfbyte_fused.values())
    assert model.train()(input_ids=ids, labels=ids).logits is None
    plain = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(), fused=False)
    assert all("fused=False" in reason for reason in plain.halfbyte_fused.values())
    assert plain.train()(input_ids=ids, labels=ids).logits is not None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_on_4_bits_trains_alike(folder_of, ids, checkpointing):
    found = []
    for fused in (True, False):
        base = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(), fused=fused)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(loss_and_gradients(model.train(), ids))
    (loss, gradients), (wanted, wanted_gradients) = found
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        assert relative(gradient, wanted_gradients[name]) < 1e-4, name


def test_signatures_copies_and_generation_stay(make_model, ids):
    plain = make_model("llama").eval()
    model = copy.deepcopy(plain)
    fuse(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(input_ids=ids, labels=ids).loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=1e-5)
    assert model.train()(input_ids=ids, labels=ids).loss.item() != pytest.approx(4.564, abs=1e-3)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.eval().generate(ids, **options), plain.generate(ids, **options))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_forward_of_somebody_else_is_theirs(make_model):
    model = make_model("llama")
    norm = model.model.norm
    norm.forward = lambda hidden_states: hidden_states
    kept = norm.forward
    fuse(model)
    assert norm.forward is kept
