"""torch.compile takes whole models, adapters and experts included, without a break: fullgraph=True."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb

from .conftest import IDS
from .test_experts import FAMILIES

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__ < "2.11", reason="graphs break with torch 2.6 and 2.7; up to 2.11 none was tried"
    ),
]
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,  # rows that the kernels do not take
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
OPTIONS = {"Llama": LLAMA, "Qwen3Moe": FAMILIES["Qwen3Moe"], "GptOss": FAMILIES["GptOss"]}
TARGETS = {
    "Llama": {"target_modules": "all-linear"},
    "Qwen3Moe": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "GptOss": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
}


@pytest.fixture
def model_of(tmp_path):
    """A model of one layer, with an adapter that changes something or without."""
    import transformers

    def model(family: str, adapter: bool, **options):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**OPTIONS[family], "num_hidden_layers": 1})
        dense = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in dense.parameters():
            nn.init.normal_(parameter, std=0.2)
        dense.save_pretrained(tmp_path / family)
        model = hb.load_model(tmp_path / family, quantization=hb.HalfbyteConfig(block_size=32))
        if adapter:
            model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS[family], **options))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        torch._dynamo.reset()
        return model

    return model


def compiled(model):
    """aot_eager traces and differentiates as inductor does, and leaves out its C++."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("family", OPTIONS)
def test_inference(model_of, family, adapter):
    model = model_of(family, adapter).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        found = compiled(model)(input_ids=IDS, use_cache=False).logits
    # One traced layer is the same calls in the same order, but for what tracing decomposes.
    assert (found - expected).norm() <= 16 * torch.finfo(torch.float32).eps * expected.norm()


def step(call, trained, **inputs):
    """The loss, with some labels ignored, and the gradients of what is trained."""
    labels = IDS.clone()
    labels[0, :3] = -100
    loss = call(input_ids=IDS, labels=labels, use_cache=False, **inputs).loss
    return loss.detach(), torch.autograd.grad(loss, trained)


def trained_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("Llama", False), ("Llama", True), ("Qwen3Moe", False), ("Qwen3Moe", True), ("GptOss", False)],
)
def test_a_training_step(model_of, family, checkpointing):
    """Also with checkpoints, for which transformers makes the embeddings' output a leaf in eager mode."""
    model = model_of(family, adapter=True).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert model.get_input_embeddings()(IDS).requires_grad
    trained = trained_of(model)
    expected, grads = step(model, trained)
    found, compiled_grads = step(compiled(model), trained)
    # The loss is computed in chunks where it is not compiled, and the gradients pass the layer once.
    tolerance = 40 * torch.finfo(torch.float32).eps
    assert (found - expected).abs() <= tolerance * expected.abs()
    for ours, theirs in zip(compiled_grads, grads, strict=True):
        assert theirs.any() and (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_training_step_under_autocast(model_of):
    """To the bit, where both round the same numbers: transformers makes a mask only where it is traced, so there is one
    here, and the traced loss divides before bfloat16 is rounded, so the divisor is a power of two."""
    model = model_of("Llama", adapter=True).train()
    trained = trained_of(model)
    mask = torch.ones(*IDS.shape, IDS.shape[1], dtype=torch.bool).tril()[:, None]
    inputs = {"attention_mask": mask, "num_items_in_batch": 16}
    with torch.autocast("cpu", torch.bfloat16):
        expected, grads = step(model, trained, **inputs)
        found, compiled_grads = step(compiled(model), trained, **inputs)
    assert (found - expected).abs() <= 40 * torch.finfo(torch.float32).eps * expected.abs()
    for ours, theirs in zip(compiled_grads, grads, strict=True):
        assert theirs.any() and torch.equal(ours, theirs)


def test_dropout_is_traced_too(model_of):
    """Its random numbers are those of the compiled graph: only that it runs, and drops, is compared."""
    model = model_of("Llama", adapter=True, lora_dropout=0.5).train()
    call = compiled(model)
    losses = [call(input_ids=IDS, labels=IDS, use_cache=False).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
