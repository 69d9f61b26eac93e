"""Tagged words: the layouts, where in the tokens the tags stand, and the sentence for a row that cannot be used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import IGNORE, label_names, read_tagged, shown_tags, tokenize_tagged
from halfbyte.data.tagged import first_tokens
from halfbyte.errors import DataError, RequestError


@pytest.mark.parametrize(
    ("row", "tags"),
    [
        ({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, ("O", "B-X")),
        ({"words": ["a", "b"], "ner_tags": [0, 7]}, ("0", "7")),
        ({"tokens": ["a", "b"], "labels": ["O", "O"], "id": "3"}, ("O", "O")),
        ({"tokens": ["a", "b"], "pos_tags": [1, 2], "ner_tags": [0, 7]}, ("0", "7")),
    ],
)
def test_layouts_become_words_and_tags(write_rows, row, tags):
    (example,) = read_tagged([write_rows([row])])
    assert (example.texts, example.label) == (("a", "b"), tags)


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# # O\n\n-DOCSTART- -X- O\n\nPeter NNP B-PER"


def test_conll_is_read_sentence_by_sentence(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text(CONLL)
    found = [(example.where, example.texts, example.label) for example in read_tagged([path])]
    assert found == [
        (f"{path}, line 3", ("EU", "rejects"), ("B-ORG", "O")),
        (f"{path}, line 7", ("#",), ("O",)),
        (f"{path}, line 11", ("Peter",), ("B-PER",)),
    ]


def test_conll_with_tabs_and_windows_line_ends(tmp_path):
    path = tmp_path / "wnut.conll"
    path.write_bytes("\ufeff@ x\tO\r\nNew York\tB-LOC\r\n\t\r\nb\tO\r\n".encode())
    assert [(e.texts, e.label) for e in read_tagged([path])] == [
        (("@ x", "New York"), ("O", "B-LOC")),
        (("b",), ("O",)),
    ]


BAD = {
    "none.jsonl": ('{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a"]}\n', "none.jsonl, line 2: the column 'tags' is"),
    "count.jsonl": ('{"tokens": ["a", "b"], "tags": [0]}\n', "count.jsonl, line 1: there are 2 tokens and 1 tags;"),
    "kind.jsonl": ('{"tokens": ["a"], "tags": [0.5]}\n', "line 1: the column 'tags[0]' must be text or an integer"),
    "word.jsonl": ('{"words": ["a", 1], "tags": [0, 0]}\n', "line 1: words[1] must be text, it is a int"),
    "text.jsonl": (
        '{"tokens": "a b", "tags": ["O", "O"]}\n',
        "line 1: the column 'tokens' must be a list, it is a str",
    ),
    "empty.jsonl": ('{"tokens": [], "tags": []}\n', "empty.jsonl, line 1: the column 'tokens' is empty"),
    "odd.jsonl": ('{"text": "a", "label": 0}\n', "odd.jsonl, line 1: the columns text, label fit no layout of tagged"),
    "train.txt": (
        "EU B-ORG\n",
        "train.txt, line 1: the columns text fit no layout of tagged words; give tokens or words",
    ),
    "ragged.conll": ("a O\nb x O\n\nc O\n", "ragged.conll, line 2: there are 3 columns, not 2"),
    "bare.conll": ("a\nb\n", "bare.conll, line 1: there are 1 columns, not 2"),
    "empty.conll": ("\n-DOCSTART- O\n\n", "empty.conll is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_with_its_line(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_tagged([tmp_path / name])
    assert expected in str(caught.value)


def test_names_are_counted_over_words(write_rows):
    path = write_rows([{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["c"], "tags": ["I-X"]}])
    assert label_names(read_tagged([path])) == ("B-X", "I-X", "O")
    with pytest.raises(DataError, match=r"all 1 rows from .* have the label 'O'"):
        label_names(read_tagged([write_rows([{"tokens": ["c", "d"], "tags": ["O", "O"]}], "one.jsonl")]))


def test_a_tag_stands_at_the_first_token_of_its_word(write_rows, tiny_tokenizer):
    """The tiny tokenizer takes each character, spaces too, for a token."""
    examples = read_tagged([write_rows([{"tokens": ["ab", "", "c d", "e"], "tags": ["B", "O", "I", 0]}])])
    data = tokenize_tagged(examples, tiny_tokenizer, ("O", "B", "I"), max_length=20)
    text = "ab  c d e"
    labels = [IGNORE] * len(text)
    labels[0], labels[4], labels[8] = 1, 2, 0
    assert tiny_tokenizer.convert_ids_to_tokens(data.dataset[0]["input_ids"]) == list(text)
    assert data.dataset[0]["labels"] == labels
    assert data.report.trained == 3
    assert data.report.notes == ("1 of 4 words have no token of their own, and are neither learnt nor measured",)
    assert (
        str(
            shown_tags(
                **{"ids" if k == "input_ids" else k: v for k, v in data.dataset[0].items()},
                names=("O", "B", "I"),
                tokenizer=tiny_tokenizer,
            )
        ).replace(" ", "")
        == "a/Bbc/Ide/O"
    )


def test_words_that_are_cut_off_are_counted(write_rows, tiny_tokenizer):
    rows = [{"tokens": ["aaaa", "bbbb", "cc"], "tags": [0, 1, 0]}, {"tokens": ["d"], "tags": [1]}]
    data = tokenize_tagged(read_tagged([write_rows(rows)]), tiny_tokenizer, ("0", "1"), max_length=6)
    assert [len(ids) for ids in data.dataset["input_ids"]] == [6, 1]
    assert data.dataset["labels"][:] == [[0] + [IGNORE] * 4 + [1], [1]]
    assert (data.report.cut, data.report.trained) == (1, 3)
    assert data.report.notes == ("1 of 4 words are cut off, and neither learnt nor measured",)


def test_rows_that_teach_nothing_and_tags_unknown_are_told_with_their_line(write_rows, tiny_tokenizer):
    rows = [{"tokens": ["a"], "tags": ["B-PER"]}, {"tokens": [" ", ""], "tags": ["O", "O"]}]
    with pytest.raises(DataError) as caught:
        tokenize_tagged(read_tagged([write_rows(rows)]), tiny_tokenizer, ("O", "B-PERS"), max_length=9)
    assert "line 1: the tag 'B-PER' is not among the classes; did you mean 'B-PERS'" in str(caught.value)
    assert "line 2: there is no word to learn a tag for" in str(caught.value)


def test_a_tokenizer_that_does_not_know_places_is_refused(write_rows):
    class Slow:
        is_fast, name_or_path = False, "/m"

    examples = read_tagged([write_rows([{"tokens": ["a"], "tags": ["O"]}])])
    with pytest.raises(RequestError, match="the tokenizer of /m cannot say which word a token belongs to"):
        tokenize_tagged(examples, Slow(), ("O",), max_length=9)


@settings(deadline=None)  # other work may hold the cores
@given(st.lists(st.text("ab ", max_size=4), min_size=1, max_size=8))
def test_every_word_with_a_letter_begins_at_its_first_letter(words):
    """Tokens of a character each: the token found is the first of the word that is no space, and None if all are."""
    text = " ".join(words)
    offsets = [(0, 0), *((at, at + 1) for at in range(len(text))), (0, 0)]
    start = 0
    for word, found in zip(words, first_tokens(words, offsets), strict=True):
        letters = [start + at + 1 for at, letter in enumerate(word) if letter != " "]
        assert found == (letters[0] if letters else None)
        start += len(word) + 1


def test_real_tokenizers_agree_with_their_own_word_ids(assets):
    """GPT-2's, byte by byte with the space at a word's start, and a character-level one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = assets / "tokenizers" / "gpt2"
    core = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    words = ["EU", "rejects", "Schwarzenegger's", "…", "naïve", "日本語", "call"]
    for trims in (False, True):
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trims)
        encoded = core.encode(" ".join(words))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=trims)
        split = core.encode(words, is_pretokenized=True)
        assert encoded.tokens[1:] == split.tokens[1:]
        starts = [split.word_ids.index(word) for word in range(len(words))]
        # The first word has no space before it in running text, and is one token there as here.
        assert first_tokens(words, encoded.offsets) == starts
