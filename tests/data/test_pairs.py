"""Pairs and judged answers as tokens: split where inference ends its prompt, ended on the stop token, cut, counted."""

from __future__ import annotations

import pytest

from halfbyte.data import (
    Renderer,
    read_judgments,
    read_preferences,
    tokenize_judgments,
    tokenize_preferences,
)
from halfbyte.errors import DataError


def test_a_pair_is_split_where_inference_ends_its_prompt(tiny_tokenizer, write_rows):
    rows = [{"prompt": "q", "chosen": "abc", "rejected": "x", "system": "s"}]
    renderer = Renderer(tiny_tokenizer)
    (row,) = tokenize_preferences(read_preferences(write_rows(rows)), renderer, max_length=99).dataset
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert row["prompt_ids"] == renderer.ids(prompt, prompt=True)
    assert tiny_tokenizer.decode(row["chosen_ids"]) == "abc</s>"  # and not the template's line break behind it
    assert tiny_tokenizer.decode(row["rejected_ids"]) == "x</s>"


def test_a_judged_answer_keeps_its_label(tiny_tokenizer, write_rows):
    rows = [{"prompt": "q", "completion": "abc", "label": label} for label in (True, False)]
    data = tokenize_judgments(read_judgments(write_rows(rows)), Renderer(tiny_tokenizer), max_length=99).dataset
    assert [tiny_tokenizer.decode(ids) for ids in data["completion_ids"][:]] == ["abc</s>", "abc</s>"]
    assert data["label"][:] == [True, False]


def test_long_pairs_are_cut_dropped_and_counted(tiny_tokenizer, write_rows):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b" * 20},
        {"prompt": "q" * 20, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
    ]
    read = read_preferences(write_rows(rows))
    data = tokenize_preferences(read, Renderer(tiny_tokenizer), max_length=16)
    assert (data.report.rows, data.report.cut, data.report.dropped, data.report.longest) == (2, 1, 1, 27)
    assert max(len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in data.dataset) == 16
    assert "1 rows have equal answers" in str(data.report)
    with pytest.raises(DataError, match="no row is left to train on: all 3 have a prompt that fills max_length 5"):
        tokenize_preferences(read, Renderer(tiny_tokenizer), max_length=5)


def test_an_answer_of_several_turns_is_refused(tiny_tokenizer, write_rows):
    talk = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
    read = read_preferences(write_rows([{"prompt": "q", "chosen": talk, "rejected": "b"}]))
    with pytest.raises(DataError, match=r"line 1: an answer must be a single turn, this one has 3"):
        tokenize_preferences(read, Renderer(tiny_tokenizer), max_length=99)


@pytest.mark.parametrize(
    ("name", "rows", "same"),
    [("llama-factory/dpo_en_demo.json", 300, 0), ("rasbt/instruction-data-with-preference.json", 1100, 6)],
)
def test_real_pairs(assets, name, rows, same):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    data = tokenize_preferences(read_preferences(assets / "instruct" / name), Renderer(tokenizer), max_length=4096)
    assert data.report.rows + data.report.dropped == rows
    assert any(f"{same} rows have equal answers" in note for note in data.report.notes) == bool(same)


def test_real_judgments(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    read = read_judgments(assets / "instruct" / "llama-factory" / "kto_en_demo.json")
    data = tokenize_judgments(read, Renderer(tokenizer), max_length=16384)
    assert (data.report.rows, data.report.cut, data.report.dropped) == (300, 0, 0)
    assert sum(data.dataset["label"][:]) == 150


def test_trl_collates_the_columns(tiny_tokenizer, write_rows):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [{"prompt": "q", "chosen": "abc", "rejected": "x"}, {"prompt": "qq", "chosen": "a", "rejected": "xx"}]
    data = tokenize_preferences(read_preferences(write_rows(rows)), Renderer(tiny_tokenizer), max_length=99).dataset
    batch = DataCollatorForPreference(pad_token_id=2)([data[0], data[1]])
    assert batch["input_ids"].shape[0] == 4
    assert batch["completion_mask"].sum(1).tolist() == [4, 2, 2, 3]
