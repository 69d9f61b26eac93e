"""Labelled text: the layouts, the names of the classes, and the sentence for a row that cannot be used."""

from __future__ import annotations

import pytest

from halfbyte.data import label_names, read_labelled, tokenize_labelled
from halfbyte.errors import DataError


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"text": "a", "label": "x"}, ("a",)),
        ({"sentence": "a", "label": "x", "idx": 3}, ("a",)),
        ({"sentence1": "a", "sentence2": "b", "label": "x"}, ("a", "b")),
        ({"premise": "a", "hypothesis": "b", "label": "x"}, ("a", "b")),
    ],
)
def test_layouts_become_texts_and_a_label(write_rows, row, texts):
    (example,) = read_labelled([write_rows([row])])
    assert (example.texts, example.label) == (texts, "x")


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 2, 2, -1], ("-1", "2", "10")), (["b", "a", "b"], ("a", "b")), (["10", "2", "x"], ("10", "2", "x"))],
)
def test_names_are_sorted_integers_by_value(write_rows, labels, names):
    rows = [{"text": "t", "label": label} for label in labels]
    assert label_names(read_labelled([write_rows(rows)])) == names


BAD = {
    "none.jsonl": ('{"text": "a", "label": "x"}\n{"text": "a"}\n', "none.jsonl, line 2: the column 'label' is missing"),
    "empty.tsv": ("sentence\tlabel\na\t0\nb\t\n", "empty.tsv, line 3: the column 'label' is missing"),
    "kind.jsonl": (
        '{"text": "a", "label": 0.5}\n',
        "kind.jsonl, line 1: the column 'label' must be text or an integer",
    ),
    "bool.jsonl": (
        '{"text": "a", "label": true}\n',
        "bool.jsonl, line 1: the column 'label' must be text or an integer",
    ),
    "blank.csv": ("text,label\n ,0\n", "blank.csv, line 2: the column 'text' is empty"),
    "list.jsonl": ('{"text": ["a"], "label": 0}\n', "list.jsonl, line 1: the column 'text' must be text, it is a list"),
    "half.jsonl": ('{"sentence1": "a", "label": 0}\n', "half.jsonl, line 1: the column 'sentence2' is missing"),
    "odd.jsonl": ('{"question": "a"}\n', "odd.jsonl, line 1: the columns question fit no layout of labelled text"),
    "one.csv": ("text,label\na,0\nb,0\n", "all 2 rows from"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_with_its_line(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        label_names(read_labelled([tmp_path / name]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_that_was_not_trained_is_told_with_its_line(write_rows, tiny_tokenizer):
    examples = read_labelled([write_rows([{"text": "a", "label": "good"}, {"text": "b", "label": "goood"}])])
    with pytest.raises(DataError, match=r"line 2: the label 'goood' is not among the classes; did you mean 'good'"):
        tokenize_labelled(examples, tiny_tokenizer, ("bad", "good"), max_length=9)


def test_pairs_beside_single_texts_are_told_with_their_line(write_rows, tiny_tokenizer):
    single = write_rows([{"text": "a", "label": 0}], "single.jsonl")
    pairs = write_rows([{"sentence1": "a", "sentence2": "b", "label": 1}], "pairs.jsonl")
    with pytest.raises(DataError, match=r"pairs.jsonl, line 1: there are 2 texts, and 1 before"):
        tokenize_labelled(read_labelled([single, pairs]), tiny_tokenizer, ("0", "1"), max_length=9)


def test_long_texts_are_cut_and_counted(write_rows, tiny_tokenizer):
    rows = [{"text": "a" * 12, "label": 5}, {"text": "b" * 3, "label": 7}]
    data = tokenize_labelled(read_labelled([write_rows(rows)]), tiny_tokenizer, ("5", "7"), max_length=9)
    assert [len(ids) for ids in data.dataset["input_ids"]] == [9, 3]
    assert data.dataset["labels"][:] == [0, 1]
    assert (data.report.rows, data.report.cut, data.report.tokens, data.report.longest) == (2, 1, 12, 12)
    assert str(data.report) == "2 rows, 12 tokens, 1 cut"


def test_real_data_is_read(assets):
    examples = read_labelled([assets / "eval" / "sst2" / "dev.tsv"])
    assert len(examples) == 872
    assert label_names(examples) == ("0", "1")
