"""Spans of tags, by hand, by the examples of conlleval, and against seqeval where it is installed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.train.entities import are_entity_tags, entities

CASES = {
    "": set(),
    "O": set(),
    "B-X": {("X", 0, 0)},
    "O B-X I-X O": {("X", 1, 2)},
    "B-X B-X": {("X", 0, 0), ("X", 1, 1)},
    "B-X I-Y": {("X", 0, 0), ("Y", 1, 1)},
    "I-X I-X O I-X": {("X", 0, 1), ("X", 3, 3)},
    "S-X S-X B-X I-X E-X O": {("X", 0, 0), ("X", 1, 1), ("X", 2, 4)},
    "B-X E-X I-X": {("X", 0, 1), ("X", 2, 2)},
    "E-X": {("X", 0, 0)},
    "U-X U-X B-X L-X I-X": {("X", 0, 0), ("X", 1, 1), ("X", 2, 3), ("X", 4, 4)},
    "B I O B": {("", 0, 1), ("", 3, 3)},
    "B-work-of-art I-work-of-art": {("work-of-art", 0, 1)},
}


@pytest.mark.parametrize("tags", CASES)
def test_spans_by_hand(tags):
    assert entities(tags.split()) == CASES[tags]


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["I-LOC", "O"], True),
        (["B", "I", "O"], True),
        (["NOUN", "VERB", "O"], False),
        (["0", "1", "2"], False),
        (["O"], False),
        (["B-", "O"], False),
        (["A-PER", "O"], False),
    ],
)
def test_which_names_mark_entities(names, marks):
    assert are_entity_tags(names) == marks


@settings(deadline=None)  # other work may hold the cores
@given(st.lists(st.sampled_from(["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("X", "Y"))])))
def test_spans_are_seqevals(tags):
    """In seqeval's default mode, which knows no L and U."""
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    assert entities(tags) == set(seqeval.get_entities(tags))
