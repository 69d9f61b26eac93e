"""Sources mixed by weight, and rows held out: by the seed and the data alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Source, read_examples
from halfbyte.data.examples import _shuffled
from halfbyte.errors import DataError


@pytest.fixture
def files(write_rows):
    """Three files of 10, 20 and 30 rows, whose questions say where they are from."""

    def rows(name, count):
        return [{"prompt": f"{name}{n}", "completion": "x"} for n in range(count)]

    return [str(write_rows(rows(name, 10 * n), f"{name}.jsonl")) for n, name in enumerate("abc", 1)]


def asked(examples):
    return [example.messages[0]["content"] for example in examples]


def shares(examples):
    return {name: sum(question[0] == name for question in asked(examples)) for name in "abc"}


def test_without_weights_every_row_is_used_once_in_order(files):
    expected = [f"{name}{n}" for count, name in enumerate("abc", 1) for n in range(10 * count)]
    examples = read_examples(files)
    assert asked(examples) == expected
    assert asked(examples) == expected  # and again: it is no iterator
    assert len(examples) == 60


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 1), {"a": 10, "b": 10, "c": 10}),
        ((0.7, 0.2, 0.1), {"a": 10, "b": 2, "c": 1}),
        ((1, 2, 3), {"a": 10, "b": 20, "c": 30}),
        ((1, 4, 1), {"a": 5, "b": 20, "c": 5}),
        ((1, None, 1), {"a": 10, "b": 10, "c": 10}),
    ],
)
def test_weights_are_shares_and_no_row_comes_twice(files, weights, expected):
    sources = [Source(path, weight) for path, weight in zip(files, weights, strict=True)]
    examples = read_examples(sources, seed=3)
    assert shares(examples) == expected
    assert examples.used == {
        path: (expected[name], 10 * n) for n, (name, path) in enumerate(zip("abc", files, strict=True), 1)
    }
    assert len(set(asked(examples))) == len(examples)
    assert asked(read_examples(sources, seed=3)) == asked(examples)
    if expected["c"] not in (0, 30):
        assert asked(read_examples(sources, seed=4)) != asked(examples)


@pytest.mark.parametrize(("held_out", "count"), [(0.05, 3), (0.001, 1), (7, 7), (59, 59)])
def test_a_split_is_repeatable_and_loses_nothing(files, held_out, count):
    examples = read_examples(files)
    rest, held = examples.split(held_out, seed=1)
    assert (len(rest), len(held)) == (60 - count, count)
    assert sorted(asked(rest) + asked(held)) == sorted(asked(examples))
    assert asked(read_examples(files).split(held_out, seed=1)[1]) == asked(held)
    assert examples.split(held_out, seed=1)[0].digest == rest.digest
    if 1 < count < 59:
        assert asked(examples.split(held_out, seed=2)[1]) != asked(held)


@pytest.mark.parametrize("held_out", [60, 0.999, 100])
def test_a_split_that_leaves_nothing_is_refused(files, held_out):
    with pytest.raises(DataError, match="leaves nothing to train on: there are 60 rows"):
        read_examples(files).split(held_out, seed=1)


def test_digests_follow_content_and_choice(files, tmp_path):
    examples = read_examples(files)
    same = tmp_path / "copy.jsonl"
    same.write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert read_examples([same, *files[1:]]).digest == examples.digest
    assert examples.take([1, 2]).digest != examples.take([1, 3]).digest != examples.digest
    same.write_text(same.read_text().replace("a3", "a_"))
    assert read_examples([same, *files[1:]]).digest != examples.digest


@given(st.integers(0, 300), st.integers(0, 2**63))
def test_shuffling_is_a_permutation(count, seed):
    assert sorted(_shuffled(count, seed, 1)) == list(range(count))


def test_shuffling_is_that_of_philox_for_ever():
    """The order is written down here: a change of it would exchange training and evaluation rows of old runs."""
    assert _shuffled(8, 42, 2).tolist() == [6, 0, 7, 2, 5, 1, 4, 3]


def test_a_file_that_changes_after_it_was_checked_is_noticed(files):
    examples = read_examples(files)
    with open(files[0], "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"a.jsonl, line 11: not JSON"):
        list(examples)
