"""Preference optimization: the loss by its definition, the reference as it was at the start, equal gradients."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.data import IGNORE, Renderer, read_preferences, tokenize_preferences
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter, train

ROWS = [
    {"prompt": letter, "chosen": letter.upper() * (n % 3 + 1), "rejected": letter * (9 - n)}
    for n, letter in enumerate("abcdefg")
]
WHOLE = {"per_device_train_batch_size": 7, "max_grad_norm": 1e9, "max_steps": 1}


@pytest.fixture
def data(write_rows):
    return str(write_rows(ROWS))


@pytest.fixture
def rows(data, tiny_tokenizer):
    return tokenize_preferences(read_preferences([data]), Renderer(tiny_tokenizer), max_length=64).dataset


@pytest.fixture
def make_trainer(tiny_llama, tiny_tokenizer, rows, tmp_path):
    def make(**keys):
        from transformers import AutoModelForCausalLM, set_seed

        from halfbyte.train.preference import PreferenceTrainer

        paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path), "dataset": "d"}
        recipe = make_recipe({**paths, "task": "preference", "method": "lora", "compute_dtype": "float32", **keys})
        set_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = add_adapter(base, recipe, "all-linear")
        return PreferenceTrainer(
            model, recipe, rows=rows, eval_rows=rows, tokenizer=tiny_tokenizer, folder=tmp_path, callbacks=[]
        )

    return make


def log_probabilities(model, rows):
    """The definition, one answer at a time: the sum over an answer's tokens. Chosen and rejected, [2, rows]."""
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            ids, labels = torch.tensor([prompt + answer]), torch.tensor([IGNORE] * len(prompt) + answer)[1:]
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            kept = labels != IGNORE
            found.append(log_probs[kept, labels[kept]].sum())
    return torch.stack(found).view(2, -1)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "qlora", "lora_dropout": 0.1},
        {"method": "qlora", "compute_dtype": "bfloat16", "gradient_checkpointing": True},
        {"method": "lora", "init_lora_weights": "pissa"},
        {"method": "full", "learning_rate": 1e-3},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_the_chosen_answers_come_to_lead(tiny_llama, data, tmp_path, keys):
    paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "run"), "dataset": data}
    sizes = {"lora_r": 4, "learning_rate": 5e-3, "max_steps": 20, "per_device_train_batch_size": 4}
    recipe = make_recipe(
        {**paths, "task": "preference", "eval_dataset": data, "compute_dtype": "float32", **sizes, **keys}
    )
    summary = train(recipe, console=Console(file=io.StringIO()))
    before, after = summary["before"], summary["after"]
    # At the start the model is its own reference: no margin but rounding, and the loss is log 2.
    rounding = 0.05 if recipe.compute_dtype == "bfloat16" else 1e-4
    assert before["eval_margin"] == pytest.approx(0, abs=rounding)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=rounding)
    assert after["eval_margin"] > 1
    assert after["eval_accuracy"] == 1
    assert after["eval_loss"] < 0.5
    assert summary["trained_dtypes"] == ["float32"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["example_prompt"] == "a"


@pytest.mark.parametrize("keys", [{"init_lora_weights": "pissa"}, {"lora_bias": "lora_only"}], ids=str)
def test_stock_peft_gives_the_log_probabilities_of_the_run(tiny_llama, data, rows, tmp_path, keys):
    """A second adapter, trl's reference, would have changed the base once more, and would be saved, too."""
    from peft import PeftModel

    from halfbyte.train.sft import load_base

    paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "run"), "dataset": data}
    sizes = {"lora_r": 4, "learning_rate": 5e-3, "max_steps": 2, "compute_dtype": "float32"}
    recipe = make_recipe({**paths, "task": "preference", "eval_dataset": data, **sizes, **keys})
    found = []

    def look(model, tokenizer, examples):
        found.append(log_probabilities(model.eval(), rows))
        return {}

    train(recipe, evaluator=look, console=Console(file=io.StringIO()))
    loaded = PeftModel.from_pretrained(load_base(recipe), tmp_path / "run").eval()
    assert torch.equal(log_probabilities(loaded, rows), found[-1])
    assert not (tmp_path / "run" / "ref").exists()


def test_there_is_one_adapter(make_trainer):
    trainer = make_trainer()
    assert list(trainer.model.peft_config) == ["default"]
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters())
    assert trainer.model.get_parameter.__self__ is trainer.model


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_the_reference_is_the_model_at_the_start(make_trainer, rows, init, tmp_path):
    """Also where the adapter does not start at zero: then switching it off would give another model (trl#4723)."""
    trainer = make_trainer(init_lora_weights=init)
    assert trainer.ref_model is None
    wanted = log_probabilities(trainer.model.eval(), rows)
    got = torch.tensor([trainer.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")])
    assert torch.allclose(got, wanted, rtol=1e-5)
    with trainer.model.disable_adapter():
        without = log_probabilities(trainer.model, rows)
    assert torch.allclose(without, wanted, rtol=1e-5) == (init in (True, "gaussian"))
    kept = load_file(tmp_path / "train_reference.safetensors")
    assert torch.equal(torch.stack([kept["ref_chosen_logps"], kept["ref_rejected_logps"]]), got)


def test_a_kept_reference_is_used_for_the_same_rows_only(make_trainer, rows, tmp_path):
    from halfbyte.train.preference import COLUMNS
    from halfbyte.train.reference import with_reference

    trainer = make_trainer()
    first = trainer.train_dataset["ref_chosen_logps"][:]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
    path = tmp_path / "train_reference.safetensors"
    same = with_reference(trainer, rows, path, COLUMNS, trainer._log_probabilities)
    assert same["ref_chosen_logps"][:] == first
    others = with_reference(trainer, rows.select([1, 0, 2]), path, COLUMNS, trainer._log_probabilities)
    assert not torch.allclose(torch.tensor(others["ref_chosen_logps"][:]), torch.tensor(first)[[1, 0, 2]])


def test_loss_margin_and_accuracy_are_what_the_paper_says(make_trainer, rows):
    """The reference is the start, the policy is what three steps made of it."""
    trainer = make_trainer(dpo_beta=0.3, max_steps=3, learning_rate=5e-3)
    reference = log_probabilities(trainer.model.eval(), rows)
    trainer.train()
    got = trainer.evaluate()
    chosen, rejected = log_probabilities(trainer.model.eval(), rows) - reference
    margins = 0.3 * (chosen - rejected)
    assert got["eval_loss"] == pytest.approx(-margins.sigmoid().log().mean().item(), rel=1e-5)
    assert got["eval_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert got["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())


def test_a_short_last_batch_weighs_what_it_should(make_trainer):
    """Seven pairs in one batch, or as 4 + 3, or one by one: equal gradients, to rounding; a mean of means differs."""
    from transformers import TrainerCallback

    found = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    losses = []
    for size, steps in ((7, 1), (4, 2), (1, 7)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "logging_steps": 1}
        trainer = make_trainer(**WHOLE | sizes)
        trainer.add_callback(Keep())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([math.log(2)] * 3, rel=1e-5)
    for gradient in found[1:]:
        assert ((gradient - found[0]).norm() / found[0].norm()).item() < 1e-6


def test_only_answers_are_trained_and_both_sides_are_padded_to_one_width(rows, tiny_tokenizer):
    from halfbyte.train.preference import collate_pairs

    batch = collate_pairs([rows[0], rows[1]], pad_id=2)
    assert batch["input_ids"].shape == batch["completion_mask"].shape == (4, batch["attention_mask"].shape[1])
    assert batch["completion_mask"].sum(1).tolist() == [2, 3, 10, 9]
    for at, text in enumerate(("A", "BB", "a" * 9, "b" * 8)):
        trained = batch["input_ids"][at][batch["completion_mask"][at] == 1]
        assert tiny_tokenizer.decode(trained).replace(" ", "") == text + "</s>"
