"""Mixture-of-experts models on grouped products: the numbers of transformers' own loop, in every layout."""

from __future__ import annotations

import copy

import pytest
import torch

import halfbyte as hb
from halfbyte.models import experts as experts_module
from halfbyte.models.experts import IMPLEMENTATION

from .conftest import IDS

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
NARROW = {**SMALL, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
# Rows of 64, which the kernels take, and of 48, which straddle blocks; shared experts; a dense first layer; matrices
# stored transposed, with biases and a gate of their own; no gate at all.
FAMILIES = {
    "Mixtral": {**SMALL, "intermediate_size": 128, "num_local_experts": 5},
    "Qwen2Moe": {**NARROW, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": {**NARROW, "moe_intermediate_size": 64, "head_dim": 16},
    "Olmoe": {**NARROW, "intermediate_size": 64},
    "DeepseekV3": {
        **{key: value for key, value in NARROW.items() if key != "num_experts"},
        **LATENT,
        **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    },
    "GptOss": {**SMALL, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "NemotronH": {
        **{key: value for key, value in SMALL.items() if key != "num_hidden_layers"},
        **{"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        **{"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1},
    },
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A family's model with packed experts."""
    import transformers

    def model(family: str, **options):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        dense = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in dense.parameters():  # some families begin experts, biases and routers with zeros or empty
            torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp(family)
        dense.save_pretrained(folder)
        return hb.load_model(folder, quantization=hb.HalfbyteConfig(block_size=32, **options))

    return model


def eager(model):
    """The same weights on transformers' own loop."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    return twin


def in_float64(model):
    """The same numbers, decoded, on transformers' own loop."""
    twin = eager(model)
    twin.dequantize()
    return twin.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_a_training_step_equal_the_loop_over_experts(model_of, family):
    """Both round differently. How far the loop is from the exact numbers is measured: here, at most 4 times that far.

    A rounding can send a token to another expert where two are as good as equal, but these are random and few.
    """
    model = model_of(family)
    assert model.config._experts_implementation == IMPLEMENTATION
    assert model.halfbyte_report.share > 0.75
    loop, exact = eager(model), in_float64(model)
    found = {}
    for name, each in (("grouped", model), ("loop", loop), ("exact", exact)):
        embeddings = each.get_input_embeddings().weight
        embeddings.requires_grad_()
        logits = each(IDS).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten()).backward()
        found[name] = (logits.detach(), embeddings.grad)
    for grouped, by_loop, true in zip(*found.values(), strict=True):
        size = true.abs().max()
        limit = 4 * (by_loop - true).abs().max() + 2.0**-22 * size
        assert (grouped - true).abs().max() <= limit and limit < 1e-4 * size


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_generation_is_that_of_the_loop(model_of, family):
    model = model_of(family)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), eager(model).generate(IDS, **options))


def test_a_layer_of_experts_within_a_derived_bound(model_of):
    """With u = eps / 2, weights, results and every elementwise step err by u of their size; silu' < 1.1."""
    experts = model_of("Qwen3Moe").model.layers[1].mlp.experts.half()
    x, index = torch.randn(9, 64).half(), torch.rand(9, 6).argsort(1)[:, :3]
    shares = torch.rand(9, 3)
    found = experts(x, index, shares)
    u, exact, allowed = 2.0**-11, torch.zeros(9, 64), torch.zeros(9, 64)
    for token in range(9):
        for expert, share in zip(index[token], shares[token], strict=True):
            up_weight = experts.gate_up_proj[expert].dequantize(torch.float32)
            down_weight = experts.down_proj[expert].dequantize(torch.float32)
            both, size = up_weight @ x[token].float(), up_weight.abs() @ x[token].float().abs()
            gate, up = both.chunk(2)
            off_gate, off_up = (2.1 * u * size).chunk(2)  # the weights', and the result's
            inner = torch.nn.functional.silu(gate) * up * share
            off = share * (1.1 * off_gate * (up.abs() + off_up) + gate.abs() * off_up) + 4 * u * inner.abs()
            exact[token] += down_weight @ inner
            allowed[token] += down_weight.abs() @ (off + 2.1 * u * (inner.abs() + off))
    allowed += u * exact.abs()
    assert ((found.float() - exact).abs() <= allowed).all()
    exchanged = experts(x, index.flip(1), shares)  # which the bound has to notice
    assert ((exchanged.float() - exact).abs() > allowed).any()


def test_a_dense_projection_beside_a_packed_one(model_of):
    """skip_modules may name one of a layer's two parameters."""
    model = model_of("Mixtral", skip_modules=["experts.down_proj"])
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, hb.QuantizedTensor)
    assert not isinstance(experts.down_proj, hb.QuantizedTensor)
    assert torch.allclose(model(IDS).logits, eager(model)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_model_runs_on_grouped_products_again(model_of, tmp_path):
    model = model_of("Mixtral")
    hb.save_model(model, tmp_path / "saved")
    again = hb.load_model(tmp_path / "saved")
    assert again.config._experts_implementation == IMPLEMENTATION
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_dense_model_keeps_transformers_own(model_of, folder_of):
    model_of("Mixtral")
    assert hb.load_model(folder_of("mixtral")).config._experts_implementation != IMPLEMENTATION


def test_experts_are_not_decoded_whole(model_of, monkeypatch):
    """One call for each projection, and no decoded tensor of all experts."""
    model = model_of("Qwen3Moe")
    monkeypatch.setattr(hb.QuantizedTensor, "dequantize", None)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_pieces_give_the_bits_of_the_whole(model_of, monkeypatch, family):
    model = model_of(family)
    with torch.no_grad():
        whole = model(IDS).logits
        monkeypatch.setattr(experts_module, "_PIECE", 1)  # each expert is one
        assert torch.equal(model(IDS).logits, whole)
    assert torch.equal(model(IDS).logits, whole)  # where gradients are wanted it is whole


@pytest.mark.parametrize(("family", "wide"), [("Mixtral", 256), ("GptOss", 128), ("NemotronH", 64)])
def test_autograd_keeps_one_tensor_between_the_projections(model_of, family, wide):
    """What follows the first projection is computed again on the way back."""
    model = model_of(family)
    experts = next(module for module in model.modules() if type(module).__name__.endswith("Experts"))
    x, index = torch.randn(50, 64, requires_grad=True), torch.rand(50, 4).argsort(1)[:, :2]
    shares = torch.rand(50, 2, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = experts(x, index, shares)
    pairs = [t for t in saved.values() if t.dtype == torch.float32 and t.dim() == 2 and len(t) == 100]
    rest = [t.shape[1] for t in pairs if t.shape[1] not in (1, wide)]
    # With biases the share comes last, so the rows that it is multiplied with are kept.
    assert sum(t.shape[1] == wide for t in pairs) == 1 and rest == ([64] if family == "GptOss" else [])
    twin = copy.deepcopy(experts)
    twin.config = copy.deepcopy(experts.config)
    twin.config._experts_implementation = "eager"
    grads = torch.autograd.grad(y.square().sum(), (x, shares))
    by_loop = torch.autograd.grad(twin(x, index, shares).square().sum(), (x, shares))
    for ours, theirs in zip(grads, by_loop, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
