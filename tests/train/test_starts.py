"""Every kind of adapter on the 4-bit base: it trains, it is saved, and stock peft loads it to equal logits."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from halfbyte.errors import RecipeError, RequestError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import check_request, load_base, train

KINDS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 3.0}},
    {"lora_bias": "lora_only"},
    *({"init_lora_weights": name} for name in ("gaussian", "orthogonal", "pissa", "olora", "loftq")),
]


@pytest.fixture
def recipe(tiny_llama, write_rows, tmp_path):
    rows = write_rows([{"prompt": c, "completion": c.upper()} for c in "abcdefgh"])

    def make(**keys):
        paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "run"), "dataset": str(rows)}
        sizes = {"lora_r": 4, "learning_rate": 1e-2, "max_steps": 2, "eval_split": 1}
        return make_recipe({**paths, **sizes, **keys})

    return make


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", KINDS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_stock_peft_gives_equal_logits(recipe, tmp_path, keys, compute):
    """PiSSA and OLoRA change the base: peft does so again when it loads, and quantization gives the same codes."""
    from peft import PeftModel

    ids, logits = torch.tensor([[1, 3, 40, 41, 42, 2]]), []

    def look(model, tokenizer, examples):
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
        return {}

    chosen = recipe(compute_dtype=compute, **keys)
    train(chosen, evaluator=look, console=Console(file=io.StringIO()))
    loaded = PeftModel.from_pretrained(load_base(chosen), tmp_path / "run").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):  # as it was measured
        assert torch.equal(loaded(input_ids=ids).logits, logits[1])
    assert not torch.equal(*logits)


def test_loftq_starts_nearer_to_the_unquantized_model(recipe, tiny_llama):
    from transformers import AutoModelForCausalLM

    ids, logits = torch.tensor([[1, 3, 40, 41, 42, 2]]), {}

    def look(model, tokenizer, examples):
        with torch.no_grad():
            logits.setdefault(start, model.eval()(input_ids=ids).logits)
        return {}

    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(input_ids=ids).logits
    for start in ("loftq", True):
        chosen = recipe(init_lora_weights=start, lora_r=16, max_steps=1, compute_dtype="float32")
        chosen = chosen.model_copy(update={"output_dir": f"{chosen.output_dir}-{start}"})
        train(chosen, evaluator=look, console=Console(file=io.StringIO()))
    error = {start: (found - wanted).norm().item() for start, found in logits.items()}
    assert error["loftq"] < 0.7 * error[True]


def test_loftq_needs_a_base_that_is_quantized_here(recipe, tiny_llama, tiny_tokenizer, tmp_path):
    from halfbyte import HalfbyteConfig
    from halfbyte.models import load_model
    from halfbyte.models.saving import save_model

    with pytest.raises(
        RecipeError, match="init_lora_weights is 'loftq' but method is 'lora', whose base loses nothing"
    ):
        recipe(init_lora_weights="loftq", method="lora")
    with pytest.raises(RecipeError, match="init_lora_weights is 'loftq', but use_dora is true"):
        recipe(init_lora_weights="loftq", use_dora=True)
    packed = save_model(load_model(tiny_llama, quantization=HalfbyteConfig()), tmp_path / "packed", tiny_tokenizer)
    with pytest.raises(
        RequestError, match=r"init_lora_weights is 'loftq'.* are quantized already; name the model that"
    ):
        check_request(recipe(init_lora_weights="loftq", model_name_or_path=str(packed)))
