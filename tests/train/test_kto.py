"""Kahneman-Tversky optimization: the loss by its definition, the reference as it was at the start, equal weights."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from halfbyte.data import IGNORE, Renderer, read_judgments, tokenize_judgments
from halfbyte.errors import RecipeError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import add_adapter, train

ROWS = [
    {"prompt": letter, "completion": (letter.upper() if n % 2 else letter) * (n % 3 + 1), "label": bool(n % 2)}
    for n, letter in enumerate("abcdefgh")
]
NEEDED = {"model_name_or_path": "/m", "output_dir": "o", "dataset": "d", "task": "kto"}


@pytest.fixture
def data(write_rows):
    return str(write_rows(ROWS))


@pytest.fixture
def rows(data, tiny_tokenizer):
    return tokenize_judgments(read_judgments([data]), Renderer(tiny_tokenizer), max_length=64).dataset


@pytest.mark.parametrize(
    "keys",
    [{"method": "qlora"}, {"method": "lora", "init_lora_weights": "pissa"}, {"method": "full", "learning_rate": 1e-3}],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_good_answers_come_to_lead(tiny_llama, data, tmp_path, keys):
    paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "run"), "dataset": data}
    sizes = {"lora_r": 4, "learning_rate": 5e-3, "max_steps": 20, "per_device_train_batch_size": 4}
    recipe = make_recipe({**paths, "task": "kto", "eval_dataset": data, "compute_dtype": "float32", **sizes, **keys})
    summary = train(recipe, console=Console(file=io.StringIO()))
    before, after = summary["before"], summary["after"]
    # At the start the model is its own reference, and 1 - sigmoid(0) is a half.
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    assert before["eval_margin"] == pytest.approx(0, abs=1e-3)
    assert after["eval_loss"] < 0.45
    assert after["eval_margin"] > 0.5
    assert after["eval_accuracy"] == 1


@pytest.fixture
def make_trainer(tiny_llama, tiny_tokenizer, rows, tmp_path):
    def make(**keys):
        from transformers import AutoModelForCausalLM, set_seed

        from halfbyte.train.judgment import JudgmentTrainer

        paths = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path), "dataset": "d"}
        recipe = make_recipe({**paths, "task": "kto", "method": "lora", "compute_dtype": "float32", **keys})
        set_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = add_adapter(base, recipe, "all-linear")
        return JudgmentTrainer(
            model, recipe, rows=rows, eval_rows=rows, tokenizer=tiny_tokenizer, folder=tmp_path, callbacks=[]
        )

    return make


def log_probabilities(model, rows, answers):
    """The definition, one answer at a time: the sum over an answer's tokens."""
    found = []
    for prompt, answer in zip(rows["prompt_ids"], answers, strict=True):
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([IGNORE] * len(prompt) + answer)[1:]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        kept = labels != IGNORE
        found.append(log_probs[kept, labels[kept]].sum())
    return torch.stack(found)


@pytest.mark.parametrize("size", [3, 8])
def test_the_loss_is_what_the_paper_says_whatever_the_batch(make_trainer, rows, size):
    """The reference is the start, the policy what three steps made of it; z is the mean over other rows' answers."""
    trainer = make_trainer(dpo_beta=0.3, max_steps=3, learning_rate=2e-2, per_device_eval_batch_size=size)
    answers = rows["completion_ids"][:]
    others = [answers[-1], *answers[:-1]]
    before = [log_probabilities(trainer.model.eval(), rows, side) for side in (answers, others)]
    trainer.train()
    ratio, other = (
        log_probabilities(trainer.model.eval(), rows, side) - start
        for side, start in zip((answers, others), before, strict=True)
    )
    got = trainer.evaluate()
    good, rest = torch.tensor(rows["label"][:]), other.mean().clamp(min=0)
    wanted = torch.where(good, 1 - (0.3 * (ratio - rest)).sigmoid(), 1 - (0.3 * (rest - ratio)).sigmoid())
    assert got["eval_loss"] == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert got["eval_margin"] == pytest.approx(0.3 * (ratio[good].mean() - ratio[~good].mean()).item(), rel=1e-3)


def test_a_short_last_batch_weighs_what_it_should(make_trainer):
    """Eight rows in one batch, or as 3 + 3 + 2; at the start z is 0 in all of them, so the gradients are equal."""
    from transformers import TrainerCallback

    found = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    for size, steps in ((8, 1), (3, 3)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "logging_steps": 1}
        trainer = make_trainer(max_grad_norm=1e9, max_steps=1, **sizes)
        trainer.add_callback(Keep())
        trainer.train()
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() < 1e-5


def test_other_answers_are_those_of_the_row_before_and_fit(rows):
    from halfbyte.train.judgment import collate_judged, with_other_answers

    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    paired = with_other_answers(rows, longest)
    answers = rows["completion_ids"][:]
    assert paired["KL_completion_ids"][:] == [answers[-1], *answers[:-1]]
    batch = collate_judged([paired[0], paired[2]], pad_id=2)
    assert batch["label"].tolist() == [False, False]
    assert batch["completion_mask"].sum(1).tolist() == [len(answers[0]), len(answers[2])]
    assert batch["KL_completion_mask"].sum(1).tolist() == [len(answers[-1]), len(answers[1])]
    assert batch["KL_input_ids"].shape == batch["KL_attention_mask"].shape == batch["KL_completion_mask"].shape


def test_bad_recipes():
    with pytest.raises(RecipeError, match="task is 'kto', which compares rows of a batch, but per_device"):
        make_recipe({**NEEDED, "per_device_train_batch_size": 1})
    with pytest.raises(RecipeError, match="eval_metric is 'f1' but task is 'kto'; choose accuracy"):
        make_recipe({**NEEDED, "eval_dataset": "d", "eval_metric": "f1"})
