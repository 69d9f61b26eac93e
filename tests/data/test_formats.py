"""Every layout of every kind of data: what a good row becomes, and the sentence for a bad one."""

from __future__ import annotations

import csv
import json

import pytest

from halfbyte.data import Source, read_examples, read_judgments, read_labelled, read_preferences
from halfbyte.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OLD = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
SYSTEM = {"role": "system", "content": "s"}
WORSE = {"role": "assistant", "content": "b"}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "add", "arguments": {"x": 1}}
IN_HULL = {"type": "function", "function": CALL}
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [IN_HULL]}, {"role": "tool", "content": "2"}, ANSWER]
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

GOOD = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "messages, text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "messages, empty fields as Parquet has them": (
        {"messages": [{**USER, "tool_calls": None, "name": None}, ANSWER]},
        [USER, ANSWER],
    ),
    "messages, tool calls": ({"messages": CALLED, "tools": [TOOL]}, CALLED),
    "messages, arguments as text": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                ANSWER,
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **IN_HULL}]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            ANSWER,
        ],
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT], "system": "s"}, [SYSTEM, USER, ANSWER]),
    "ShareGPT, function call": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                GPT,
            ],
            "tools": json.dumps([TOOL]),
        },
        CALLED,
    ),
    "Alpaca": ({"instruction": "q", "output": "a"}, [USER, ANSWER]),
    "Alpaca, input": (
        {"instruction": "q", "input": "i", "output": "a"},
        [{"role": "user", "content": "q\n\ni"}, ANSWER],
    ),
    "Alpaca, history": (
        {"instruction": "q", "input": "", "output": "a", "history": [["q0", "a0"]], "system": "s"},
        [SYSTEM, *OLD, USER, ANSWER],
    ),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    "prompt, completion, as messages": ({"prompt": [*OLD, USER], "completion": [ANSWER]}, [*OLD, USER, ANSWER]),
}


@pytest.mark.parametrize("name", GOOD)
def test_conversations(write_rows, name):
    row, messages = GOOD[name]
    (example,) = read_examples(write_rows([row]))
    assert list(example.messages) == messages
    assert [tool["function"] for tool in example.tools] == ([TOOL] if "tools" in row else [])


def test_a_prompt_and_weights_say_what_is_not_learnt(write_rows):
    silent = [{**turn, "weight": 0} for turn in OLD]
    (weighed, prompted) = (
        *read_examples(write_rows([{"messages": [*silent, USER, {**ANSWER, "weight": 1}]}], "weights.jsonl")),
        *read_examples(write_rows([{"prompt": [*OLD, USER], "completion": "a"}], "prompt.jsonl")),
    )
    assert (weighed.unweighted, weighed.prompt_turns) == ({0, 1}, 0)
    assert (prompted.unweighted, prompted.prompt_turns) == (set(), 3)


PAIRS = {
    "ShareGPT": ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}}, [USER]),
    "Alpaca": ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "output": "a"}, [USER]),
    "prompt, texts": ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, [SYSTEM, USER]),
    "prompt, messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, [USER]),
    "whole": ({"chosen": [*OLD, USER, ANSWER], "rejected": [*OLD, USER, WORSE]}, [*OLD, USER]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(write_rows, name):
    row, prompt = PAIRS[name]
    (example,) = read_preferences(write_rows([row]))
    assert (list(example.prompt), example.chosen, example.rejected) == (prompt, (ANSWER,), (WORSE,))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"messages": [USER, ANSWER], "label": True}, True),
        ({"prompt": "q", "completion": "a", "label": 0}, False),
        ({"prompt": "q", "completion": "a", "label": "false"}, False),
    ],
)
def test_judgments(write_rows, row, label):
    (example,) = read_judgments(write_rows([row]))
    assert (example.prompt, example.completion, example.label) == ((USER,), (ANSWER,), label)


def write_file(folder, suffix, rows):
    """The same rows in every kind of file that has rows."""
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig" if suffix == ".csv" else "utf-8") as file:
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
            writer = csv.DictWriter(file, list(rows[0]), **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": f'q{n} "x", ü', "completion": "a" * n} for n in range(1, 5)]
    read = read_examples(write_file(tmp_path, suffix, rows))
    assert [(e.messages[0]["content"], e.messages[1]["content"]) for e in read] == [tuple(r.values()) for r in rows]


def test_a_text_longer_than_the_csv_module_allows_by_default(tmp_path):
    (example,) = read_examples(write_file(tmp_path, ".csv", [{"text": "a" * 200_000}]))
    assert len(example.text) == 200_000


def test_a_json_array_is_read_across_windows(tmp_path, monkeypatch):
    """Items are found wherever the windows over the file end."""
    monkeypatch.setattr("halfbyte.data.read._CHUNK", 7)
    rows = [{"prompt": 'q, ] } \\ " [', "completion": "a" * n} for n in range(1, 30)]
    read = list(read_examples(write_file(tmp_path, ".json", rows)))
    assert [e.messages[1]["content"] for e in read] == [row["completion"] for row in rows]
    assert read[2].where.endswith("rows.json, item 3 (line 10)")  # each object is four lines with its braces


def test_a_folder_gives_its_files_in_order_without_its_readme(tmp_path):
    for name in ("b", "a", ".hidden"):
        folder = tmp_path / name
        folder.mkdir()
        write_file(folder, ".jsonl", [{"prompt": name, "completion": "x"}])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [e.messages[0]["content"] for e in read_examples(tmp_path)] == ["a", "b"]


def test_a_folder_of_texts(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    assert [e.text for e in read_examples(tmp_path)] == ["a.md", "b.txt"]


def test_a_hub_name_is_loaded_and_a_path_never_is(tmp_path, monkeypatch):
    from datasets import Dataset

    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}])

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match=r"^nobody/nothing \(test\), row 2: the column 'completion' is missing"):
        read_examples([Source("nobody/nothing", split="test", name="small")])
    assert asked == [(("nobody/nothing", "small"), {"split": "test"})]

    asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/train", "data/train.jsonl", "./nobody/nothing", "rows", "a/b/c", "nobody/train.json"):
        with pytest.raises(DataError):
            read_examples(path)
    assert not asked


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("offline\nfor now")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        read_examples("nobody/nothing")
    assert str(caught.value).endswith("cannot be loaded from the hub: offline for now.")


P, C = '"prompt": "q"', '"completion": "a"'
BAD = {
    # what can be wrong with a turn
    "turns none": (read_examples, {"messages": []}, "the column 'messages' must be a list of turns"),
    "turns text": (read_examples, {"messages": "hi"}, "the column 'messages' must be a list of turns"),
    "turn text": (read_examples, {"messages": ["hi"]}, "messages[0] must be an object with a role and a content"),
    "no role": (read_examples, {"messages": [{"content": "q"}]}, "messages[0] lacks 'role'"),
    "no content": (read_examples, {"messages": [USER, {"role": "assistant"}]}, "messages[1] lacks 'content'"),
    "no value": (read_examples, {"conversations": [HUMAN, {"from": "gpt"}]}, "conversations[1] lacks 'value'"),
    "image": (
        read_examples,
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        "messages[0] has content that is neither text nor a list of text parts",
    ),
    "half a weight": (
        read_examples,
        {"messages": [USER, {**ANSWER, "weight": 0.5}]},
        "messages[1] has the weight 0.5; a turn is learnt (1) or not (0)",
    ),
    "nothing weighed": (read_examples, {"messages": [USER, {**ANSWER, "weight": 0}]}, "there is no answer to learn"),
    "blank answer": (read_examples, {"instruction": "q", "output": " "}, "there is no answer to learn from"),
    "call not JSON": (
        read_examples,
        {"conversations": [HUMAN, {"from": "function_call", "value": "add(1)"}]},
        "conversations[1] (function_call) is not JSON",
    ),
    "call without name": (
        read_examples,
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
        "messages[1].tool_calls[0] has no 'name'",
    ),
    "user calls": (read_examples, {"messages": [{**USER, "tool_calls": [IN_HULL]}, ANSWER]}, "messages[0] has tool_c"),
    "tools not JSON": (read_examples, {"messages": [USER, ANSWER], "tools": "add"}, "the column 'tools' is not JSON"),
    "tools no list": (read_examples, {"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' must be a list of"),
    "tool without name": (read_examples, {"messages": [USER, ANSWER], "tools": [{}]}, "tools[0] has no 'name'"),
    "history": (
        read_examples,
        {"instruction": "q", "output": "a", "history": [["q0"]]},
        "history[0] must be a pair of texts",
    ),
    "system": (read_examples, {"instruction": "q", "output": "a", "system": 3}, "the column 'system' must be text"),
    "preferences": (read_examples, {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "preference learning"),
    "empty text": (read_examples, {"text": " "}, "the column 'text' is empty"),
    # preferences
    "no rejected": (read_preferences, {"prompt": "q", "chosen": "a"}, "the column 'rejected' is missing"),
    "empty rejected": (
        read_preferences,
        {"prompt": "q", "chosen": "a", "rejected": " "},
        "the column 'rejected' holds an empty answer",
    ),
    "null rejected": (
        read_preferences,
        {"prompt": "q", "chosen": "a", "rejected": None},
        "the column 'rejected' is missing, which prompt preference data needs",
    ),
    "chosen by the user": (
        read_preferences,
        {"prompt": "q", "chosen": [USER], "rejected": "b"},
        "the column 'chosen' must end with the assistant's turn, not the user's",
    ),
    "nothing in common": (
        read_preferences,
        {"chosen": [USER, ANSWER], "rejected": [*OLD]},
        "chosen and rejected have no turn in common",
    ),
    "texts alone": (read_preferences, {"chosen": "a", "rejected": "b"}, "without a prompt the column 'chosen' must be"),
    "no label": (read_judgments, {"messages": [USER, ANSWER]}, "the column 'label' is missing"),
    "odd label": (read_judgments, {"messages": [USER, ANSWER], "label": "good"}, "must be true or false, it is 'good'"),
    "judged question": (read_judgments, {"messages": [*OLD, USER], "label": True}, "that ends with the assistant's"),
    "judged silence": (read_judgments, {"prompt": "q", "completion": "", "label": True}, "the answer is empty"),
    # labelled text
    "labelled": (read_labelled, {"text": "a"}, "the column 'label' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_with_its_file_and_line(write_rows, name):
    read, row, expected = BAD[name]
    path = write_rows([row])
    with pytest.raises(DataError) as caught:
        read(path)
    told = str(caught.value)
    assert told.startswith(f"{path}, line 1: ")
    assert expected in told
    assert told.endswith((".", "?"))
    assert "\n" not in told


def test_the_first_bad_rows_are_told_at_once_and_the_others_counted(tmp_path):
    good = json.dumps({"prompt": "q", "completion": "a"})
    lines = [good, "{", '{"prompt": "q"}', *['{"prompt": 1, "completion": "a"}'] * 12, good]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    (tmp_path / "two.jsonl").write_text("3")
    with pytest.raises(DataError) as caught:
        read_examples([tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "three.jsonl"])
    told = str(caught.value).splitlines()
    assert told[0].startswith(f"{tmp_path}/one.jsonl, line 2: not JSON")
    assert told[1].startswith(f"{tmp_path}/one.jsonl, line 3: the column 'completion' is missing")
    assert len(told) == 11
    assert told[10] == "... and 6 more bad rows."


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json, line 2: not JSON"),
        ("a.json", b'[{"text": "a"},\n\n', "a.json, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8 text (byte 0xff)"),
        ("a.json", b'[{"text": "\xff"}]', "a.json is not UTF-8 text: byte 0xff"),
        ("a.csv", b'text\n"a\n', "a.csv, line 2: not a table"),
        ("a.csv", b"text,label\n", "a.csv is empty"),
        ("a.tsv", b"text\tlabel\na\n", "a.tsv, line 2: the row has not as many columns as the header (text, label)"),
        ("a.parquet", b"PAR1", "a.parquet: not a Parquet file"),
        ("a.txt", b" \n", "a.txt is empty"),
    ],
)
def test_a_damaged_file_is_told_with_its_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_is_told(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="holds no data files"):
        read_examples(tmp_path)


REAL = {
    "rasbt/instruction-data.json": (read_examples, 1100),
    "rasbt/instruction-data-with-preference.json": (read_preferences, 1100),
    "llama-factory/alpaca_en_demo.json": (read_examples, 999),
    "llama-factory/identity.json": (read_examples, 91),
    "llama-factory/v1_sft_demo.jsonl": (read_examples, 500),
    "llama-factory/glaive_toolcall_en_demo.json": (read_examples, 300),
    "llama-factory/dpo_en_demo.json": (read_preferences, 300),
    "llama-factory/kto_en_demo.json": (read_judgments, 300),
}


def strings(value):
    """Every text in a JSON value, but keys."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(strings, items))


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_read_without_loss(assets, name):
    """Every text of a file is found again in what is made of it; calls and tools, which are JSON in a text, decoded."""
    read, count = REAL[name]
    path = assets / "instruct" / name
    records = [json.loads(x) for x in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    records = records or json.loads(path.read_text())
    examples = list(read(path))
    assert len(examples) == len(records) == count
    for record, example in zip(records, examples, strict=True):
        whole = json.dumps([vars(example)[key] for key in vars(example) if key not in ("where", "unweighted")])
        for text in strings(record) - {"human", "gpt", "observation", "function_call", "text", ""}:
            if "chosen" in record and text == record.get("output"):
                continue  # the answer of a supervised row stands beside the pair
            try:
                decoded = json.loads(text)
            except json.JSONDecodeError:
                decoded = text
            for part in strings(decoded) or {text}:
                assert json.dumps(part)[1:-1] in whole, (example.where, part)


def test_real_labelled_text(assets):
    examples = list(read_labelled(assets / "eval" / "sst2" / "train.tsv"))
    lines = (assets / "eval" / "sst2" / "train.tsv").read_text().splitlines()[1:]
    assert [f"{e.texts[0]}\t{e.label}" for e in examples] == lines
    assert len(examples) == 67_349
