"""New tokens: only their rows are trained, loss and generation read the same rows, and stock peft loads them."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.errors import RecipeError, RequestError
from halfbyte.train.new_tokens import add_rows, tokenizer_of
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter, check_data, train

NEW = ["qux", "quux"]
ROWS = [{"prompt": f"qux{c}", "completion": f"{c.upper()}quux"} for c in "abcdefgh"]
PAIRS = [{"prompt": f"qux{c}", "chosen": f"{c.upper()}quux", "rejected": c} for c in "abcdefgh"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def llama(request, tiny_llama, tmp_path_factory):
    """The tiny Llama, whose head is its embeddings, and one that has a head of its own."""
    if request.param == "tied":
        return tiny_llama
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("untied")
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(write_rows, tmp_path):
    def make(model, rows=ROWS, **keys):
        paths = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run")}
        data = {"dataset": str(write_rows(rows)), "max_length": 32}
        sizes = {"compute_dtype": "float32", "lora_r": 4, "learning_rate": 5e-3, "max_steps": 4}
        return make_recipe({**paths, **data, **sizes, "new_tokens": NEW, **keys})

    return make


@pytest.mark.parametrize(
    "keys",
    [{}, {"compute_dtype": "bfloat16", "gradient_checkpointing": True}, {"task": "preference", "rows": PAIRS}],
    ids=str,
)
def test_stock_peft_gives_equal_logits(llama, recipe, tmp_path, keys):
    """On a base that is made larger by transformers' own call, whose new rows are random."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from halfbyte.train.sft import load_base

    chosen, logits = recipe(llama, **keys), []
    ids = torch.tensor([[1, 106, 40, 41, 107, 2]])

    def look(model, tokenizer, examples):
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
        return {}

    # Held out rows are never looked at here; they are what makes the run measure, and so show the model.
    train(chosen.model_copy(update={"eval_split": 1}), evaluator=look, console=Console(file=io.StringIO()))
    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.convert_tokens_to_ids(NEW) == [106, 107]
    base = load_base(chosen)
    torch.manual_seed(5)
    base.resize_token_embeddings(len(tokenizer))
    loaded = PeftModel.from_pretrained(base, run).eval()
    bf16 = chosen.compute_dtype == "bfloat16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as it was measured
        assert torch.equal(loaded(input_ids=ids).logits, logits[-1])
    assert not torch.equal(logits[0][..., 106:], logits[-1][..., 106:])
    saved = load_file(run / "adapter_model.safetensors")
    rows = {name: tensor.shape for name, tensor in saved.items() if "trainable_tokens" in name}
    tied = json.loads((llama / "config.json").read_text())["tie_word_embeddings"]
    assert list(rows.values()) == [(2, 32)] * (1 if tied else 2)
    assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in saved)


@pytest.fixture
def adapted(recipe):
    """A model with an adapter, and new rows that a step has moved off those of the matrix."""

    def make(llama, **keys):
        from transformers import AutoModelForCausalLM

        from halfbyte.models import load_model

        chosen = recipe(llama, method="lora", **keys)
        tokenizer, pieces = tokenizer_of(chosen)
        base = load_model(llama, dtype=torch.float32)
        add_rows(base, pieces)
        model = add_adapter(base, chosen, "all-linear", (), list(pieces))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(torch.randn_like(parameter))
        return model, tokenizer, AutoModelForCausalLM

    return make


def test_the_loss_in_chunks_is_that_of_the_logits(llama, adapted):
    """Both read the trained rows, in embeddings and head, which a head's own weight has not; gradients too."""
    model, _, _ = adapted(llama)
    ids = torch.tensor([[1, 106, 40, 107, 106, 107, 2], [1, 50, 107, 2, 2, 2, 2]])
    labels = ids.masked_fill(ids == 1, -100)
    found = {}
    for fused in (True, False):
        model.train()
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, skip_logits=fused)
        assert (output.logits is None) == fused
        output.loss.backward()
        found[fused] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[fused]["loss"] = output.loss.detach()
    assert found[True].keys() == found[False].keys()
    assert any("trainable_tokens_delta" in name for name in found[True])
    for name, value in found[False].items():
        assert torch.allclose(found[True][name], value, rtol=1e-4, atol=1e-6), name


def test_only_the_new_rows_are_trained(llama, adapted):
    model, _, _ = adapted(llama)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {tuple(p.shape) for p in trained.values()} == {(2, 32)}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not any("embed_tokens" in n and p.requires_grad for n, p in model.named_parameters() if "delta" not in n)


def test_generation_reads_the_trained_rows(llama, adapted):
    """A row of the head that is far along a token's hidden state wins: generate says the token the loss would like."""
    model, _, _ = adapted(llama)
    model.eval()
    ids = torch.tensor([[1, 50, 51]])
    with torch.no_grad():
        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[0, -1]
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter[1] = 50 * hidden
    said = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[0, -1]
    loss = model(input_ids=torch.tensor([[1, 50, 51, 107]]), labels=torch.tensor([[-100] * 3 + [107]])).loss
    assert said == 107
    assert loss < 1e-3


def test_rows_start_as_the_mean_of_their_pieces(llama, recipe):
    from transformers import AutoModelForCausalLM

    tokenizer, pieces = tokenizer_of(recipe(llama))
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in pieces.values()] == [list(token) for token in NEW]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    add_rows(model, pieces)
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(layer.weight[:106], old)
        for index, ids in pieces.items():
            assert torch.allclose(layer.weight[index], old[ids].mean(0))


def test_full_fine_tuning_saves_a_larger_model(tiny_llama, recipe, tmp_path):
    train(recipe(tiny_llama, method="full", max_steps=1), console=Console(file=io.StringIO()))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"] == 108


def test_the_command_line_answers_with_them(tiny_llama, recipe, tmp_path):
    from halfbyte.cli.answering import open_engine
    from halfbyte.infer import SamplingParams

    train(recipe(tiny_llama), console=Console(file=io.StringIO()))
    with open_engine(str(tmp_path / "run"), {}) as engine:
        assert engine.token_ids("aqux")[-1] == 106
        assert engine.model.get_base_model().config.vocab_size == 108
        assert engine.decoder == "transformers' own forward, because adapter run has trainable_token_indices"
        (answer,) = engine.generate(["aqux"], SamplingParams(3, ignore_end=True), adapter=engine.adapters[0])
        assert len(answer.choices) == 3


def test_bad_requests(tiny_llama, recipe):
    with pytest.raises(RecipeError, match=r"new_tokens .* names a token twice, or an empty one"):
        recipe(tiny_llama, new_tokens=["x1", "x1"])
    with pytest.raises(RequestError, match=r"new_tokens: '<\|user\|>' is in the tokenizer's vocabulary already"):
        check_data(recipe(tiny_llama, new_tokens=["<|user|>"]))


@pytest.mark.parametrize("what", ["a bias", "nf4"])
def test_layers_that_cannot_have_new_rows_are_refused(tiny_llama, what):
    from transformers import LlamaConfig, LlamaForCausalLM

    from halfbyte.tensor import quantize

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False))
    if what == "nf4":
        embeddings = model.get_input_embeddings()
        embeddings.weight = torch.nn.Parameter(quantize(embeddings.weight.detach(), "nf4", 64, 8), requires_grad=False)
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(106))
    with pytest.raises(RequestError, match=f"new_tokens.*{what}"):
        add_rows(model, {106: [1]})
