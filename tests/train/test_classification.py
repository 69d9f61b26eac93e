"""A classifier on the same run: it learns, its head is saved with its names, and batches do not change its numbers."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.train.recipe import make_recipe
from halfbyte.train.sft import train

LETTERS = {"early": "abcdefgh", "late": "stuvwxyz"}


def texts(count, seed):
    """Letters of one end of the alphabet; which end is the class. Lengths differ, so that batches are padded."""
    draw = random.Random(seed)
    rows = []
    for label in (*LETTERS,) * (count // 2):
        rows.append({"text": " ".join(draw.choices(LETTERS[label], k=draw.randint(2, 9))), "label": label})
    return rows


@pytest.fixture
def run(tiny_bert, write_rows, tmp_path):
    def start(model=tiny_bert, evaluator=None, **keys):
        recipe = make_recipe(
            {
                "model_name_or_path": str(model),
                "output_dir": str(tmp_path / "run"),
                "dataset": str(write_rows(texts(400, 0), "train.jsonl")),
                "eval_dataset": str(write_rows(texts(200, 1), "eval.jsonl")),
                "task": "sequence-classification",
                "compute_dtype": "float32",
                "lora_r": 4,
                "learning_rate": 5e-3,
                "max_steps": 50,
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
        {"method": "qlora", "compute_dtype": "bfloat16", "gradient_checkpointing": True, "target_modules": "attention"},
        {"method": "lora", "compute_dtype": "float16"},
        {"method": "full", "learning_rate": 1e-3},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_an_encoder_learns_to_classify(run, keys):
    folder, summary = run(**keys)
    assert abs(summary["before"]["eval_accuracy"] - 0.5) < 0.2
    assert summary["after"]["eval_accuracy"] >= 0.95
    assert summary["after"]["eval_f1"] >= 0.95
    assert summary["after"]["eval_f1_binary"] >= 0.95
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert (summary["quantized_share"] > 0.5) == (keys["method"] == "qlora")
    assert summary["trained_dtypes"] == ["float32"]
    assert summary["tokens_per_second"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "early", "1": "late"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert "quantization_config" not in config


def test_a_decoder_learns_to_classify(run, tiny_llama):
    """It is asked at its last token: its config, which names no pad token, has to get the one that batches have."""
    folder, summary = run(tiny_llama, max_length=32)
    assert abs(summary["before"]["eval_accuracy"] - 0.5) < 0.2
    assert summary["after"]["eval_accuracy"] >= 0.95
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 2
    assert "base_model.model.score.weight" in load_file(folder / "adapter_model.safetensors")


def test_the_adapter_gives_equal_logits_in_stock_peft(run, tiny_bert):
    """The pooler too, which the base has not: a random one that is not saved would be another one here."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    ids = torch.tensor([[2, 5, 9, 3], [2, 25, 24, 3]])
    logits = []

    def look(model, tokenizer, examples):
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
        return {}

    folder, _ = run(method="lora", evaluator=look)
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, config=AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
    assert torch.equal(loaded, logits[1])
    assert not torch.allclose(loaded, logits[0], atol=0.1)


def test_a_head_that_is_packed_in_the_folder_is_refused(run, tiny_bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from halfbyte import HalfbyteConfig
    from halfbyte.errors import RequestError
    from halfbyte.models import load_model, save_model

    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "plain")  # with a pooler
    packed = load_model(tmp_path / "plain", quantization=HalfbyteConfig(), task="encoder")
    save_model(packed, tmp_path / "packed", AutoTokenizer.from_pretrained(tiny_bert))
    for keys, name in (({}, "bert.pooler.dense.weight"), ({"method": "full"}, "bert.encoder.layer.0")):
        with pytest.raises(RequestError, match=f"packed holds {name}.* in nf4, which cannot be trained whole"):
            run(tmp_path / "packed", **keys)
    assert not (tmp_path / "run").exists()


def test_pairs_are_told_apart(run, write_rows):
    """Whether the second text is of the end of the alphabet that the first is of."""
    pairs = [
        {"sentence1": one["text"], "sentence2": two["text"], "label": int(one["label"] == two["label"])}
        for one, two in zip(texts(96, 2), random.Random(3).sample(texts(96, 4), 96), strict=True)
    ]
    _, summary = run(dataset=str(write_rows(pairs)), eval_dataset=[], max_steps=2)
    assert summary["labels"] == ["0", "1"]
    assert summary["steps"] == 2


def test_a_short_last_batch_weighs_what_it_should(tiny_bert, write_rows, tmp_path):
    """Seven rows in one batch, or as 4 + 3: equal gradients, to float32's rounding; a mean of means differs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, set_seed

    from halfbyte.data import label_names, read_labelled, tokenize_labelled
    from halfbyte.train.classifier import ClassifierTrainer

    examples = read_labelled([write_rows(texts(8, 0)[:7])])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = tokenize_labelled(examples, tokenizer, label_names(examples), max_length=32).dataset
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found[args.per_device_train_batch_size] = [p.grad.clone() for p in model.parameters()]

    losses = []
    for size, steps in ((7, 1), (4, 2)):
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        keys = {"task": "sequence-classification", "method": "full", "max_steps": 1, "max_grad_norm": 1e9}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "logging_steps": 1}
        paths = {"model_name_or_path": str(tiny_bert), "output_dir": str(tmp_path), "dataset": "d"}
        recipe = make_recipe({**paths, **keys, **sizes, "compute_dtype": "float32", "per_device_eval_batch_size": size})
        trainer = ClassifierTrainer(
            model, recipe, rows=rows, eval_rows=rows, tokenizer=tokenizer, folder=tmp_path, callbacks=[Keep()]
        )
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(next(log["loss"] for log in trainer.state.log_history if "loss" in log))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    whole, split = (torch.cat([grad.flatten() for grad in found[size]]) for size in (7, 4))
    assert ((split - whole).norm() / whole.norm()).item() < 1e-6


def test_f1_is_the_mean_over_the_classes_that_occur(monkeypatch):
    """By hand: of class 0, 2 of 3 are found and nothing else is taken for it; class 3 does not occur."""
    from types import SimpleNamespace

    from halfbyte.train.classifier import ClassifierTrainer

    trainer = ClassifierTrainer.__new__(ClassifierTrainer)
    given, found = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 1])
    logits = torch.nn.functional.one_hot(found, 4).float()
    monkeypatch.setattr(
        ClassifierTrainer, "forward_again", lambda self, model, batch: SimpleNamespace(logits=batch["l"])
    )
    totals = Counter()
    for rows in (slice(0, 2), slice(2, 5)):  # the batches do not matter
        totals.update(trainer.sums(None, {"labels": given[rows], "l": logits[rows]}))
    means = trainer.means(totals)
    assert means["accuracy"] == pytest.approx(3 / 5)
    assert means["f1"] == pytest.approx((2 * 2 / (2 + 3) + 2 * 1 / (3 + 1) + 0) / 3)
    assert set(means) == {"loss", "accuracy", "f1"}


def test_f1_of_two_classes_is_also_that_of_the_second():
    """By hand: class 1 is said 3 times and is so twice, both times when it is said."""
    from halfbyte.train.classifier import ClassifierTrainer

    trainer = ClassifierTrainer.__new__(ClassifierTrainer)
    given, found = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 1, 0])
    means = trainer.means(Counter({"loss": 1.0, "accuracy": 3, "count": 4, **trainer.counts(found, given, 2)}))
    assert means["f1_binary"] == pytest.approx(2 * 2 / (3 + 2))
    assert means["f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)


def test_classes_can_be_named_by_number(run, write_rows):
    rows = [{"text": row["text"], "label": int(row["label"] == "late")} for row in texts(16, 0)]
    held_out = [{"text": "a b", "label": "early"}, {"text": "z", "label": 1}]
    keys = {"label_names": ["early", "late", "never"], "max_steps": 1}
    folder, summary = run(dataset=str(write_rows(rows)), eval_dataset=str(write_rows(held_out, "e.jsonl")), **keys)
    assert summary["labels"] == ["early", "late", "never"]
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "early", "1": "late", "2": "never"}


def test_a_class_that_only_rows_held_out_have_is_known(run, write_rows):
    """They come from the same file, so it cannot be a mistake in one of two files."""
    rows = [*texts(14, 0), {"text": "m", "label": "middle"}]
    _, summary = run(dataset=str(write_rows(rows)), eval_dataset=[], eval_split=8, max_steps=1)
    assert summary["labels"] == ["early", "late", "middle"]
