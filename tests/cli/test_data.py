"""`halfbyte data`: no weight is read, what is wrong is one sentence each, and real data is shown."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from halfbyte.cli.main import app


@pytest.fixture
def show(tmp_path, tiny_llama):
    """Runs the command on a recipe of the given keys; the model folder has no weights."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "model.safetensors").unlink()

    def run(*options, expected=0, **keys):
        recipe = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "out"), "lora_r": 4, **keys}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = CliRunner().invoke(app, ["data", str(tmp_path / "recipe.yaml"), *options])
        assert result.exit_code == expected, result.output + repr(result.exception)
        assert not (tmp_path / "out").exists()
        return result.stdout if expected == 0 else result.stderr

    return run


def lines(told):
    """Table and text lines, without the spaces that align them."""
    return [" ".join(line.split()) for line in told.splitlines()]


def test_conversations_are_shown(show, write_rows):
    rows = [{"prompt": "q" * n, "completion": "abc"} for n in (1, 2, 2, 9)]
    path = write_rows(rows)
    told = lines(show(dataset=str(path), max_length=32, packing=True))
    assert "<s><|user|>q</s>" in told
    assert "<|assistant|>⟦abc</s>⟧" in told
    assert any(line.startswith(f"{path}, line 4, the longest, 19 tokens") for line in told)
    assert "rows 4" in told
    assert "tokens 54" in told  # 10 more than each question
    assert "of these trained 29.6%" in told  # 16 of them
    assert "the longest has 19 tokens" in told
    assert any(line.startswith("4 rows are packed into 2 of 32 tokens") for line in told)
    assert f"odd: 1 rows repeat an earlier row (2 times the same at most): {path}, line 3" in told


def test_sources_are_counted(show, write_rows):
    one, two = (
        write_rows([{"prompt": "q", "completion": name}] * n, name) for name, n in (("a.jsonl", 4), ("b.jsonl", 9))
    )
    told = lines(show(dataset={str(one): 0.5, str(two): 0.5}))
    assert f"{one}: 4 of 4 rows" in told
    assert f"{two}: 4 of 9 rows" in told


def test_rows_that_are_held_out_are_shown_beside(show, write_rows):
    rows = [{"prompt": "q" * n, "completion": "a"} for n in range(1, 21)]
    told = lines(show("-n", "0", dataset=str(write_rows(rows)), eval_split=0.1))
    assert "trained on measured on" in told
    assert "rows 18 2" in told
    assert not any("⟦" in line for line in told)


def test_labelled_texts_are_shown(show, write_rows):
    rows = [{"text": "good " * n, "label": n % 2} for n in range(1, 5)]
    told = lines(show(dataset=str(write_rows(rows)), task="sequence-classification"))
    assert "good -> 1" in told
    assert "label 0 2" in told
    assert "label 1 2" in told


def test_pairs_of_answers_are_shown(show, write_rows):
    rows = [{"prompt": "q" * n, "chosen": "yes", "rejected": "no"} for n in (60, 1, 9, 1)]  # the first has no room
    path = write_rows([*rows, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    told = show(dataset=str(path), task="preference", max_length=32)
    assert "<s><|user|>q</s>\n<|assistant|>\nchosen: ⟦yes</s>⟧\nrejected: ⟦no</s>⟧\n" in told
    told = lines(told)
    assert f"{path}, line 2, 10 tokens" in told  # six of the prompt, and the end token behind "yes"
    assert any(line.startswith(f"{path}, line 3, the longest, 1") for line in told)
    assert "dropped (no answer within max_length) 1" in told
    assert f"odd: 1 rows repeat an earlier row (2 times the same at most): {path}, line 4" in told
    assert "1 rows have equal answers, between which nothing can be learnt." in told
    assert "Answers stand in ⟦ ⟧ behind their prompt." in told


def test_text_is_shown(show, tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 20)
    told = show(dataset=str(tmp_path / "a.txt"), max_length=16)
    assert "a block of text, 16 tokens" in " ".join(told.split())
    assert "a⟦bcabcabcabcabca⟧" in told


def test_bad_data_is_told_row_by_row(show, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "q", "completion": "a"}\n{"prompt": "q"}\n{"prompt": 1, "completion": "a"}\n'
    )
    told = show(dataset=str(tmp_path / "bad.jsonl"), expected=2).splitlines()
    assert told[0].endswith("bad.jsonl, line 2: the column 'completion' is missing, which completion data needs.")
    assert told[1].endswith("bad.jsonl, line 3: the column 'prompt' must be text, it is a int.")
    assert len(told) == 2


@pytest.mark.parametrize(
    "name",
    [
        "llama-factory/alpaca_en_demo.json",
        "llama-factory/identity.json",
        "llama-factory/glaive_toolcall_en_demo.json",
        "llama-factory/v1_sft_demo.jsonl",
        "rasbt/instruction-data.json",
    ],
)
def test_real_data_is_shown(assets, tmp_path, name):
    path = (assets / "instruct" / name).resolve()  # as a recipe names it
    recipe = {
        "model_name_or_path": str(assets / "models" / "stories260K"),
        "output_dir": str(tmp_path / "out"),
        "dataset": str(path),
        "eval_split": 0.05,
        "max_length": 512,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["data", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert f"{path}, " in result.stdout
    assert "⟦" in result.stdout


def test_real_pairs_are_shown(assets, tmp_path):
    path = (assets / "instruct" / "llama-factory" / "dpo_en_demo.json").resolve()
    recipe = {
        "model_name_or_path": str(assets / "models" / "stories260K"),
        "output_dir": str(tmp_path / "out"),
        "dataset": str(path),
        "task": "preference",
        "max_length": 512,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["data", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert f"{path}, " in result.stdout
    assert result.stdout.count("chosen: ⟦") == result.stdout.count("rejected: ⟦") > 2


def test_real_labels_are_shown(assets, tmp_path):
    recipe = {
        "model_name_or_path": str(assets / "models" / "stories260K"),
        "output_dir": str(tmp_path / "out"),
        "dataset": str(assets / "eval" / "sst2" / "dev.tsv"),
        "task": "sequence-classification",
        "max_length": 128,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["data", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert "label 1 444" in lines(result.stdout)


def test_answers_are_shown_with_what_is_said_of_them(show, write_rows):
    pairs = write_rows([{"prompt": "q", "chosen": "yes", "rejected": "no"}], "pairs.jsonl")
    told = lines(show(dataset=str(pairs), task="preference"))
    assert f"{pairs}, line 1, the longest, 10 tokens" in told
    text = " ".join(told)
    assert "<s><|user|>q</s> <|assistant|> chosen: ⟦yes</s>⟧ rejected: ⟦no</s>⟧" in text
    judged = [{"prompt": "q", "completion": "yes", "label": True}, {"prompt": "q", "completion": "no", "label": False}]
    text = " ".join(lines(show(dataset=str(write_rows(judged)), task="kto")))
    assert "<s><|user|>q</s> <|assistant|> good: ⟦yes</s>⟧" in text
    assert "<s><|user|>q</s> <|assistant|> bad: ⟦no</s>⟧" in text


def test_tagged_words_are_shown_with_their_tags(show, write_rows):
    rows = [{"tokens": ["ab", "c"], "tags": ["B-X", "O"]}] * 2
    told = lines(show(dataset=str(write_rows(rows)), task="token-classification"))
    assert "a/B-Xb c/O" in told
    assert "label B-X 2" in told and "label O 2" in told
    assert any(line.startswith("odd: 1 rows repeat an earlier row") for line in told)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [("dpo_en_demo.json", "preference", ("chosen: ", "rejected: ")), ("kto_en_demo.json", "kto", ("good: ", "bad: "))],
)
def test_real_answers_are_shown(show, assets, name, task, said):
    model = str(assets / "models" / "stories260K")
    data = str(assets / "instruct" / "llama-factory" / name)
    text = show("-n", "9", dataset=data, task=task, model_name_or_path=model)
    assert all(word in text for word in said)
    assert "⟦" in text and "rows" in text
