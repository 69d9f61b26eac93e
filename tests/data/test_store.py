"""Rows on disk: the same whoever tokenized them, kept by what they were made from, and complete or not there."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest

from halfbyte.data import IGNORE, Example, Renderer, read_examples, tokenize
from halfbyte.data import tokens as tokens_module
from halfbyte.data.store import RowReader
from halfbyte.errors import DataError, OutputError

ROWS = [{"prompt": "q" * (n % 5), "completion": "a" * (1 + n % 7)} for n in range(600)]


@pytest.fixture
def examples(write_rows):
    return read_examples(write_rows(ROWS))


def columns(data):
    return data.dataset["input_ids"][:], data.dataset["labels"][:]


def count_builds(monkeypatch):
    built = []
    build = tokens_module._build
    monkeypatch.setattr(tokens_module, "_build", lambda *args, **kwargs: (built.append(1), build(*args, **kwargs)))
    return built


def test_rows_do_not_depend_on_where_they_are_tokenized_or_kept(examples, tiny_tokenizer, tmp_path):
    renderer = Renderer(tiny_tokenizer)
    here = tokenize(list(examples), renderer, max_length=16, train_on="completion")
    kept = tokenize(examples, renderer, max_length=16, train_on="completion", cache=tmp_path / "cache")
    others = tokenize(examples, renderer, max_length=16, train_on="completion", workers=2)
    assert columns(here) == columns(kept) == columns(others)
    assert here.report == kept.report == others.report
    assert kept.dataset.cache_files  # it is a file that is mapped, not a copy in memory
    assert not here.dataset.cache_files


def test_what_is_kept_is_found_by_content_and_settings(examples, tiny_tokenizer, tmp_path, monkeypatch, write_rows):
    built = count_builds(monkeypatch)
    options = {"max_length": 16, "train_on": "completion", "cache": tmp_path / "cache"}
    first = tokenize(examples, Renderer(tiny_tokenizer), **options)
    again = tokenize(read_examples(write_rows(ROWS, "copy.jsonl")), Renderer(tiny_tokenizer), **options)
    assert columns(first) == columns(again)
    assert first.report == again.report
    assert len(built) == 1
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{# changed #}" + other.chat_template
    wider = copy.deepcopy(tiny_tokenizer)
    wider.add_tokens(["aa"])
    for renderer, changed in (
        (Renderer(tiny_tokenizer), {"max_length": 15}),
        (Renderer(tiny_tokenizer), {"train_on": "last_turn"}),
        (Renderer(other), {}),
        (Renderer(wider), {}),
    ):
        tokenize(examples, renderer, **{**options, **changed})
    tokenize(read_examples(write_rows([*ROWS, ROWS[0]])), Renderer(tiny_tokenizer), **options)
    assert len(built) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 6  # nothing half-built is left


def test_an_interrupted_build_leaves_nothing(examples, tiny_tokenizer, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens_module, "write_facts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize(examples, Renderer(tiny_tokenizer), max_length=16, train_on="all", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_told(examples, tiny_tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot be written .*; name another by HALFBYTE_CACHE"):
        tokenize(examples, Renderer(tiny_tokenizer), max_length=16, train_on="all", cache=tmp_path / "cache")


def test_facts_are_those_of_the_rows(examples, tiny_tokenizer):
    data = tokenize(examples, Renderer(tiny_tokenizer), max_length=12, train_on="completion")
    ids, labels = columns(data)
    whole = [Renderer(tiny_tokenizer).training_rows(example)[0] for example in examples]
    kept = [n for n, row in enumerate(whole) if any(row.trained[:12])]
    assert data.facts.origin.tolist() == kept
    assert data.facts.length.tolist() == [len(whole[n].ids) for n in kept]
    assert data.facts.trained.tolist() == [sum(x != IGNORE for x in row) for row in labels]
    same = {}
    for n, print_ in zip(kept, data.facts.fingerprint.tolist(), strict=True):
        assert same.setdefault(print_, whole[n].ids.tolist()) == whole[n].ids.tolist()
    report = data.report
    lengths = np.array([len(row.ids) for row in whole])
    assert (report.rows, report.dropped) == (len(kept), len(whole) - len(kept))
    assert report.cut == sum(lengths[n] > 12 for n in kept)
    assert report.tokens == sum(map(len, ids))
    assert report.lost == lengths.sum() - report.tokens
    assert report.longest == lengths.max()
    assert report.trained == data.facts.trained.sum()
    for percent, value in report.percentiles.items():
        assert np.mean(lengths <= value) >= int(percent) / 100 - 1 / len(lengths)
        assert np.mean(lengths < value) <= int(percent) / 100


def test_a_script_without_a_guard_is_told_so(examples, tiny_tokenizer, tmp_path, write_rows):
    """Worker processes import the script again; without a guard it would start workers of its own."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(
        "from transformers import AutoTokenizer\n"
        "from halfbyte.data import Renderer, read_examples, tokenize\n"
        f"renderer = Renderer(AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r}))\n"
        f"examples = read_examples({str(write_rows(ROWS))!r})\n"
        "tokenize(examples, renderer, max_length=16, train_on='all', workers=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("halfbyte.errors.WorkError: the processes that tokenize have died; a script")


def test_rows_are_read_at_random_across_batches(examples, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("halfbyte.data.store._BATCH_TOKENS", 100)
    data = tokenize(examples, Renderer(tiny_tokenizer), max_length=16, train_on="completion")
    ids, labels = columns(data)
    reader = RowReader(data, ("input_ids", "labels"))
    for index in (599, 0, 300, 7):
        assert [column.tolist() for column in reader.row(index)] == [ids[index], labels[index]]


def test_bad_rows_of_all_chunks_are_told_at_once(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_module, "CHUNK", 4)
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    rows = [Example(f"f, line {n}", talk, unweighted=frozenset({1} if n % 3 == 0 else ())) for n in range(1, 40)]
    with pytest.raises(DataError) as caught:
        tokenize(rows, Renderer(tiny_tokenizer), max_length=9, train_on="completion")
    told = str(caught.value).splitlines()
    assert told[0] == "f, line 3: none of the answers is trained with train_on: completion."
    assert told[9].startswith("f, line 30: ")
    assert told[10] == "... and 3 more bad rows."


def test_a_text_that_begins_with_bos_gets_no_second_one(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    texts = [Example("row", text="<s>Once upon a time"), Example("row", text="Once upon a time</s>")]
    data = tokenize(texts, Renderer(tokenizer), max_length=99, train_on="all")
    (ids,) = data.dataset["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 2


def test_the_report_says_what_the_template_does(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else '*' }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = tuple({"role": role, "content": "x"} for role in ("user", "assistant") * 2)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    data = tokenize([Example("row", talk, tools=(tool,))], Renderer(tokenizer), max_length=50, train_on="completion")
    assert data.report.rows == 2
    assert "1 conversations became one row for each answer" in str(data.report)
    assert "1 rows have tools that the chat template does not show" in str(data.report)


def test_a_prompt_that_ends_within_a_token_is_told(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    talk = Example("row", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The end"}))
    assert Renderer(tokenizer).prompt_is_whole  # the default template
    assert not tokenize([talk], Renderer(tokenizer), max_length=99, train_on="completion").report.notes
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = tokenize([talk], Renderer(tokenizer), max_length=99, train_on="completion")
    assert "the chat template's prompt ends within a token" in str(data.report)


def test_the_store_stays_below_its_limit(monkeypatch, tmp_path, write_rows, tiny_tokenizer):
    """A data set that nobody uses makes room for the next one."""
    from halfbyte.data import eviction

    monkeypatch.setattr(eviction, "_held", {})
    monkeypatch.setenv("HALFBYTE_CACHE_GB", "0")
    cache = tmp_path / "cache"
    for letter in "ab":
        path = write_rows([{"prompt": letter, "completion": letter}], f"{letter}.jsonl")
        made = tokenize(
            read_examples(path), Renderer(tiny_tokenizer), max_length=32, train_on="completion", cache=cache
        )
        assert len(made.dataset) == 1
        assert [folder.name for folder in cache.iterdir()] == [made.key]  # the one in use is over the limit, and stays
        for file in eviction._held.values():
            file.close()
        eviction._held.clear()  # as if the process had ended
