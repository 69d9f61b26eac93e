"""The loss mask: which tokens are trained, to the token."""

from __future__ import annotations

import copy

import pytest

from halfbyte.data import IGNORE, Example, Renderer, pad_rows, tokenize
from halfbyte.errors import DataError

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "by"},
]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ["own", MARKED, None])
def test_answers_and_their_end_tokens_are_trained_and_nothing_else(tiny_tokenizer, template):
    """Also where the end token stands outside the generation markers, where it is the pad token, and where a line
    break follows it."""
    tokenizer = tiny_tokenizer if template == "own" else with_template(tiny_tokenizer, template)
    data = tokenize([Example("row", tuple(TALK))], Renderer(tokenizer), max_length=99, train_on="completion")
    (row,) = data.dataset
    trained = [token for token in row["labels"] if token != IGNORE]
    assert tokenizer.decode(trained) == "yo</s>by</s>"
    assert all(label in (IGNORE, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert data.report.trained == len(trained)


def test_training_and_inference_render_the_same_prompt(tiny_tokenizer):
    renderer = Renderer(tiny_tokenizer)
    (row,) = renderer.training_rows(Example("row", tuple(TALK)))
    first, ids = row.trained.argmax(), row.ids.tolist()
    assert ids[:first] == renderer.ids(TALK[:1], prompt=True)
    assert ids.count(tiny_tokenizer.bos_token_id) == 1
    assert renderer.stop_ids == [tiny_tokenizer.eos_token_id]


def test_no_second_bos_from_a_tokenizer_that_adds_its_own(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # it does add one
    renderer = Renderer(tokenizer)
    assert renderer.ids(TALK, prompt=False).count(tokenizer.bos_token_id) == 1
    (row,) = renderer.training_rows(Example("row", tuple(TALK)))
    assert row.ids.tolist() == renderer.ids(TALK, prompt=False)


def test_a_template_without_an_end_token_is_refused(tiny_tokenizer):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="no end token after an answer"):
        Renderer(with_template(tiny_tokenizer, endless)).training_rows(Example("row", tuple(TALK)))


def test_long_rows_are_cut_dropped_and_counted(tiny_tokenizer):
    def row(question, answer):
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Example("row", turns)

    examples = [row("a", "b"), row("a", "b" * 50), row("a" * 50, "b")]
    data = tokenize(examples, Renderer(tiny_tokenizer), max_length=20, train_on="completion")
    assert (data.report.rows, data.report.cut, data.report.dropped) == (2, 1, 1)
    assert max(len(ids) for ids in data.dataset["input_ids"]) == 20
    with pytest.raises(DataError, match="no row is left"):
        tokenize(examples[2:], Renderer(tiny_tokenizer), max_length=20, train_on="completion")


def test_text_loses_no_token(tiny_tokenizer):
    texts = [Example("row", text="abcdefg"), Example("row", text="hij")]
    data = tokenize(texts, Renderer(tiny_tokenizer), max_length=5, train_on="completion")
    for row in data.dataset:
        assert row["labels"] == [IGNORE, *row["input_ids"][1:]]  # nothing leads to the first token of a block
    stream = [token for ids in data.dataset["input_ids"] for token in ids]
    assert tiny_tokenizer.decode(stream) == "abcdefg</s>hij</s>"


def test_rows_with_one_label_are_padded_with_their_token_types():
    rows = [
        {"input_ids": [7], "token_type_ids": [1], "labels": 2},
        {"input_ids": [7, 8], "token_type_ids": [0, 1], "labels": 0},
    ]
    batch = pad_rows(rows, 3)
    assert batch["input_ids"].tolist() == [[7, 3], [7, 8]]
    assert batch["token_type_ids"].tolist() == [[1, 0], [0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [2, 0]


def test_padding_goes_by_length_where_pad_is_the_end_token(tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.pad_token_id == end
    rows = [
        {"input_ids": [7, end], "labels": [IGNORE, end]},
        {"input_ids": [7, 8, 9, end], "labels": [IGNORE, 8, 9, end]},
    ]
    batch = pad_rows(rows, end)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, end, IGNORE, IGNORE], [IGNORE, 8, 9, end]]
