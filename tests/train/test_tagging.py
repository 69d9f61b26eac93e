"""Token classification on the same run: entities are found, the head is saved with the names of its classes."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest
import torch
from rich.console import Console

from halfbyte.data import IGNORE
from halfbyte.errors import RecipeError
from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

NEEDED = {"model_name_or_path": "/m", "output_dir": "o", "dataset": "d"}


def sentences(count, seed):
    """A person is a word that begins with x, and perhaps one with w after it; a place begins with y and goes on with z.

    A word's first letter says its tag, which is what an encoder that was never pretrained can learn in some 240 steps.
    """
    draw = random.Random(seed)

    def word(first):
        return first + "".join(draw.choices("abcdef", k=draw.randint(0, 2)))

    rows = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(["O", "PER", "LOC"])
            if kind == "O":
                words.append(word(draw.choice("abcdef")))
                tags.append("O")
                continue
            words.append(word({"PER": "x", "LOC": "y"}[kind]))
            tags.append(f"B-{kind}")
            for _ in range(draw.randint(0, 1)):
                words.append(word({"PER": "w", "LOC": "z"}[kind]))
                tags.append(f"I-{kind}")
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.fixture
def run(tiny_subword_bert, write_rows, tmp_path):
    def start(model=tiny_subword_bert, evaluator=None, rows=None, **keys):
        recipe = make_recipe(
            {
                "model_name_or_path": str(model),
                "output_dir": str(tmp_path / "run"),
                "dataset": str(write_rows(rows or sentences(400, 0), "train.jsonl")),
                "eval_dataset": str(write_rows(rows or sentences(100, 1), "eval.jsonl")),
                "task": "token-classification",
                "compute_dtype": "float32",
                "lora_r": 8,
                "learning_rate": 5e-3,
                "max_steps": 240,
                "per_device_train_batch_size": 16,
                "logging_steps": 25,
                "per_device_eval_batch_size": 50,
                **keys,
            }
        )
        return tmp_path / "run", train(recipe, evaluator=evaluator, console=Console(file=io.StringIO()))

    return start


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "qlora"},
        {"method": "qlora", "compute_dtype": "bfloat16", "gradient_checkpointing": True},
        {"method": "full", "learning_rate": 1e-3},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_an_encoder_learns_to_find_entities(run, keys):
    folder, summary = run(**keys)
    before, after = summary["before"], summary["after"]
    assert before["eval_f1"] < 0.5
    for name in ("accuracy", "f1", "precision", "recall"):
        assert after[f"eval_{name}"] >= 0.9
    assert after["eval_loss"] < before["eval_loss"]
    assert (summary["quantized_share"] > 0.5) == (keys["method"] == "qlora")
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert config["architectures"] == ["BertForTokenClassification"]


def test_a_decoder_learns_too(run, tiny_llama):
    """Its tokens see what stands before them only, which is enough here."""
    _, summary = run(tiny_llama, max_length=64)
    assert summary["after"]["eval_f1"] >= 0.9


def test_the_adapter_gives_equal_logits_in_stock_peft(run, tiny_subword_bert):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForTokenClassification

    ids = torch.tensor([[2, 27, 31, 3], [2, 28, 29, 3]])
    logits = []

    def look(model, tokenizer, examples):
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
        return {}

    folder, _ = run(method="lora", evaluator=look, max_steps=10)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForTokenClassification.from_pretrained(tiny_subword_bert, config=config)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
    assert torch.equal(loaded, logits[1])
    assert not torch.allclose(loaded, logits[0], atol=0.1)


def test_what_is_printed_asks_the_model(run, monkeypatch, capsys):
    """The lines run as they stand, and find what the training data call a person."""
    from halfbyte.cli.train import _report, classifier_lines
    from halfbyte.train.recipe import load_recipe

    folder, summary = run()
    recipe = load_recipe(folder / "recipe.yaml")
    _report(recipe, summary)
    shown = capsys.readouterr().out
    assert "F1 on eval_dataset, of entities" in shown and "recall" in shown
    lines = [line.replace('"..."', '"ab xcd wf a"') for line in classifier_lines(recipe, ["classifier"], str(folder))]
    exec("\n".join(lines).replace("print(", "found = ("), names := {})
    assert [(one["entity_group"], one["word"].replace(" ##", "")) for one in names["found"]] == [("PER", "xcd wf")]


def test_entities_are_counted_over_sentences():
    """By hand. Padding and later tokens of a word, which have no label, break no entity and count nowhere."""
    from types import SimpleNamespace

    from halfbyte.train.classifier import TaggerTrainer

    names = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    trainer = TaggerTrainer.__new__(TaggerTrainer)
    trainer.model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    labels = torch.tensor([[IGNORE, 1, IGNORE, 2, 0, IGNORE], [3, 4, 0, 1, IGNORE, IGNORE]])
    found = torch.tensor([[4, 1, 0, 2, 0, 3], [3, 2, 0, 1, 1, 1]])
    totals = Counter({"loss": 14.0, "accuracy": 6, "count": 7}) + Counter(trainer.counts(found, labels, 5))
    means = trainer.means(totals)
    # True: X 0-1 in one sentence; Y 0-1 and X 3-3 in the other. Said: X 0-1; Y 0-0, X 1-1, X 3-3.
    assert means == pytest.approx(
        {"loss": 2.0, "accuracy": 6 / 7, "precision": 2 / 4, "recall": 2 / 3, "f1": 2 * 2 / (3 + 4)}
    )


def test_tags_that_mark_no_entities_have_the_f1_of_classes(run):
    rows = [{"tokens": ["ab", "x"], "tags": ["NOUN", "VERB"]}, {"tokens": ["x"], "tags": ["ADV"]}]
    _, summary = run(rows=rows, max_steps=1)
    assert "eval_f1" in summary["after"] and "eval_recall" not in summary["after"]


def test_a_short_last_batch_weighs_what_it_should(tiny_subword_bert, write_rows, tmp_path):
    """Seven sentences in one batch, or as 4 + 3: equal gradients, to rounding; a mean of means over words differs."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer, TrainerCallback, set_seed

    from halfbyte.data import label_names, read_tagged, tokenize_tagged
    from halfbyte.train.classifier import TaggerTrainer

    examples = read_tagged([write_rows(sentences(7, 0))])
    tokenizer = AutoTokenizer.from_pretrained(tiny_subword_bert)
    names = label_names(examples)
    rows = tokenize_tagged(examples, tokenizer, names, max_length=32).dataset
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found[args.per_device_train_batch_size] = [p.grad.clone() for p in model.parameters()]

    losses = []
    for size, steps in ((7, 1), (4, 2)):
        set_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(
            tiny_subword_bert,
            dtype=torch.float32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(names)),
        )
        keys = {"task": "token-classification", "method": "full", "max_steps": 1, "max_grad_norm": 1e9}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "logging_steps": 1}
        recipe = make_recipe(
            {**NEEDED, **keys, **sizes, "compute_dtype": "float32", "per_device_eval_batch_size": size}
        )
        trainer = TaggerTrainer(
            model, recipe, rows=rows, eval_rows=rows, tokenizer=tokenizer, folder=tmp_path, callbacks=[Keep()]
        )
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(next(log["loss"] for log in trainer.state.log_history if "loss" in log))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    whole, split = (torch.cat([grad.flatten() for grad in found[size]]) for size in (7, 4))
    assert ((split - whole).norm() / whole.norm()).item() < 1e-6


def test_bad_recipes():
    with pytest.raises(RecipeError, match="eval_metric is 'exact_match' but task is 'token-classification'"):
        make_recipe({**NEEDED, "task": "token-classification", "eval_dataset": "e", "eval_metric": "exact_match"})
    with pytest.raises(RecipeError, match="label_names are set but task is 'causal-lm', which has no classes"):
        make_recipe({**NEEDED, "label_names": ["a", "b"]})
    with pytest.raises(RecipeError, match=r"label_names .* needs at least two names, no two of which are equal"):
        make_recipe({**NEEDED, "task": "token-classification", "label_names": ["a", "a"]})
