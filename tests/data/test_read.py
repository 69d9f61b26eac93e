"""Files and rows: what is read, and the sentence for what cannot be."""

from __future__ import annotations

import pytest

from halfbyte.data import Problems, read_examples, read_rows
from halfbyte.errors import DataError

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"messages": QA}, ["user", "assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QA[1]]}, ["user", "assistant"]),
        ({"instruction": "q", "output": "a", "system": "s"}, ["system", "user", "assistant"]),
        ({"prompt": "q", "completion": "a"}, ["user", "assistant"]),
        ({"prompt": QA[:1], "completion": QA[1:]}, ["user", "assistant"]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
            ["user", "assistant"],
        ),
    ],
)
def test_layouts_become_messages(write_rows, row, roles):
    (example,) = read_examples([write_rows([row])])
    assert [message["role"] for message in example.messages] == roles
    assert [message["content"] for message in example.messages][-2:] == ["q", "a"]


def test_alpaca_input_is_part_of_the_question(write_rows):
    (example,) = read_examples([write_rows([{"instruction": "Add.", "input": "1 2", "output": "3"}])])
    assert example.messages[0]["content"] == "Add.\n\n1 2"


BAD = {
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "rows.jsonl": ('{"text": "a"}\n\n{"text": }\n', "rows.jsonl, line 3: not JSON"),
    "list.json": ('[{"text": "a"}, 3]', "list.json, item 2 (line 1): a row must be an object"),
    "lacks.jsonl": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
        "lacks.jsonl, line 2: the column 'completion'",
    ),
    "half.jsonl": ('{"instruction": "a"}\n', "half.jsonl, line 1: the column 'output' is missing"),
    "odd.jsonl": ('{"question": "a"}\n', "odd.jsonl, line 1: the columns question fit no known layout"),
    "role.jsonl": ('{"messages": [{"role": "asistant", "content": "a"}]}\n', "did you mean 'assistant'?"),
    "mute.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}\n', "mute.jsonl, line 1: there is no answer"),
    "kind.jsonl": ('{"prompt": 3, "completion": "b"}\n', "the column 'prompt' must be text, it is a int"),
    "short.csv": ("prompt,completion\na,b\na\n", "short.csv, line 3: the row has not as many columns"),
    "data.parqet": ("x", "'.parqet', which is not read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_with_its_line(tmp_path, name):
    content, expected = BAD[name]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_examples([path])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(write_rows, tmp_path):
    write_rows([{"text": "a"}], "train.jsonl")
    with pytest.raises(DataError, match=r"tain.jsonl does not exist; did you mean 'train.jsonl'\?"):
        read_rows(tmp_path / "tain.jsonl", Problems())


def test_json_strings_may_hold_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert next(read_rows(path, Problems())).columns == {"text": "a\u2028b"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rasbt/instruction-data.json", 1100),
        ("llama-factory/alpaca_en_demo.json", 999),
        ("llama-factory/v1_sft_demo.jsonl", 500),
        ("llama-factory/glaive_toolcall_en_demo.json", 300),
    ],
)
def test_real_data_is_read(assets, name, count):
    examples = read_examples([assets / "instruct" / name])
    assert len(examples) == count
    assert all(example.messages for example in examples)
