"""Tokenizers as GGUF tables: right where llama.cpp does the same, refused with the reason where it does not."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import RequestError
from halfbyte.models.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)

CONFIG = SimpleNamespace(bos_token_id=None)


def tables(tokenizer, rows=None, stops=()):
    """What GGUF says, without the prefix, and the notes."""
    vocabulary = read_vocabulary(tokenizer, rows or len(tokenizer), CONFIG, list(stops))
    values = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in vocabulary.values.items()}
    return values, vocabulary.notes


def described(tokenizer, **changes):
    """The same tokenizer with parts of its description replaced."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | changes)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
    )


def greedy(values, text: str) -> list[int]:
    """llama.cpp's tokenizer `llama`: merge the neighbours whose result scores highest, from the left."""
    ids = {token: index for index, token in enumerate(values["tokens"])}
    pieces = list((" " * values["add_space_prefix"] + text).replace(" ", "▁"))
    while True:
        merged = [
            (values["scores"][ids[left + right]], -at)
            for at, (left, right) in enumerate(pairwise(pieces))
            if left + right in ids
        ]
        if not merged:
            break
        at = -max(merged)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_merge_as_the_merges_do(build, prefix):
    tokenizer = build.sentencepiece(prefix)
    values, notes = tables(tokenizer)
    assert values["model"] == "llama" and values["add_space_prefix"] is prefix and not notes
    for text in (
        "Once upon a time there was",
        "the other model's 678 days",
        "x",
        "Später? 日本 🦙!",
        "othother the they",
        "a  b   c    d",
    ):
        assert greedy(values, text) == tokenizer.encode(text, add_special_tokens=False), text


def test_types_of_tokens_and_rows_without_one(build):
    tokenizer = build.sentencepiece(True)
    values, _ = tables(tokenizer, len(tokenizer) + 2)
    kinds = dict(zip(values["tokens"], values["token_type"], strict=True))
    assert kinds["<unk>"] == UNKNOWN and kinds["<s>"] == kinds["</s>"] == kinds["<|user|>"] == CONTROL
    assert kinds["<0x0A>"] == BYTE and kinds["▁the"] == NORMAL
    assert kinds["▁▁"] == NORMAL  # although it is an added token: merges make it
    assert [kinds[token] for token in values["tokens"][-2:]] == [UNUSED, UNUSED]
    assert len(set(values["tokens"])) == len(values["tokens"]) == len(tokenizer) + 2
    with pytest.raises(RequestError, match="resize the model's embeddings"):
        tables(tokenizer, len(tokenizer) - 1)


@pytest.mark.parametrize(
    ("content", "normalized", "text", "kind"),
    [
        ("▁x", True, " x", USER_DEFINED),  # found where ▁ stands for a space, and llama.cpp looks before it does
        ("a b", False, "a b", USER_DEFINED),
        ("<▁>", False, "<▁>", USER_DEFINED),
        ("▁the▁", False, None, UNUSED),  # transformers takes only ▁ for it, llama.cpp would take spaces
    ],
)
def test_added_tokens_with_spaces(build, content, normalized, text, kind):
    tokenizer = build.sentencepiece(False)
    tokenizer.add_tokens(AddedToken(content, normalized=normalized))
    values, notes = tables(tokenizer)
    assert values["token_type"][-1] == kind
    assert values["tokens"][-1] == (text or f"[PAD{len(tokenizer) - 1}]")
    assert bool(notes) == (text is None) and all("is left out" in note for note in notes)


def test_an_added_token_that_is_found_after_a_space_only_is_told(build):
    tokenizer = build.sentencepiece(True)
    tokenizer.add_tokens("<tool>")
    ids = tokenizer.encode("x<tool> <tool>", add_special_tokens=False)
    assert ids.count(len(tokenizer) - 1) == 1
    assert "'<tool>' is found by transformers after a space only" in tables(tokenizer)[1][0]


def test_an_added_token_of_a_byte_level_tokenizer_keeps_its_text(build):
    tokenizer = build.byte_level(build.QWEN2, ignore_merges=False, bos=False)
    tokenizer.add_tokens("<tool▁call>")
    assert tables(tokenizer)[0]["tokens"][-1] == "<tool▁call>"


def test_a_filler_does_not_repeat_a_token(build):
    tokenizer = build.sentencepiece(True)
    rows = len(tokenizer) + 2
    tokenizer.add_tokens(f"[PAD{rows - 1}]")
    values, _ = tables(tokenizer, rows)
    assert len(set(values["tokens"])) == rows


@pytest.mark.parametrize(
    ("regex", "ignore_merges", "name"),
    [("LLAMA3", True, "llama-bpe"), ("LLAMA3", False, "smaug-bpe"), ("QWEN2", False, "qwen2")],
)
def test_a_byte_level_tokenizer_is_known_by_what_it_does(build, regex, ignore_merges, name):
    tokenizer = build.byte_level(getattr(build, regex), ignore_merges=ignore_merges, bos=False)
    tokenizer.add_tokens("<tool>")  # what a fine-tuning adds changes the usual converter's hash
    values, _ = tables(tokenizer)
    assert (values["model"], values["pre"]) == ("gpt2", name)
    assert values["merges"] and all(len(merge.split(" ")) == 2 for merge in values["merges"])
    assert values["token_type"][-1] == USER_DEFINED


def test_transformers_own_qwen_and_llama_are_known(build):
    from transformers import Qwen2Tokenizer

    core = json.loads(Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]).backend_tokenizer.to_str())
    trained = build.byte_level(build.QWEN2, ignore_merges=False, bos=False)
    values, notes = tables(described(trained, pre_tokenizer=core["pre_tokenizer"], normalizer=core["normalizer"]))
    assert values["pre"] == "qwen2" and "NFC" in notes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer Whitespace"),
    ],
)
def test_a_step_without_a_counterpart_is_refused_by_name(build, changes, said):
    with pytest.raises(RequestError, match=said):
        tables(described(build.sentencepiece(True), **changes))


def test_an_unknown_regular_expression_is_refused(build):
    with pytest.raises(RequestError, match=r"is none of llama.cpp's that are known here: gpt-2"):
        tables(build.byte_level(r"\p{L}+|\s+|.", ignore_merges=False, bos=False))
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    with pytest.raises(RequestError, match="'ByteLevel with add_prefix_space'"):
        tables(described(build.byte_level(build.QWEN2, ignore_merges=False, bos=False), pre_tokenizer=spaced))


def test_a_merge_that_only_llama_cpp_would_make_is_refused(build):
    core = json.loads(build.sentencepiece(True).backend_tokenizer.to_str())
    left, right = core["model"]["merges"][7]
    model = core["model"] | {"merges": [merge for merge in core["model"]["merges"] if merge != [left, right]]}
    with pytest.raises(RequestError, match=re.escape(f"would merge {left!r} and {right!r}")):
        tables(described(build.sentencepiece(True), model=model))


def test_a_character_that_is_no_token_is_merged_by_llama_cpp_all_the_same(build):
    core = json.loads(build.sentencepiece(True).backend_tokenizer.to_str())
    model = core["model"] | {"vocab": core["model"]["vocab"] | {"qx": len(core["model"]["vocab"])}}
    assert "q" not in model["vocab"]
    with pytest.raises(RequestError, match="would merge 'q' and 'x'"):
        tables(described(build.sentencepiece(True), model=model, added_tokens=[]))


def test_merges_whose_order_no_score_can_say_are_refused():
    words = ["<unk>", *"abc", "ab", "bc", "abc"]

    def merging(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate(words)}
        core = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", byte_fallback=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    values, _ = tables(merging(("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")))
    assert values["scores"][-3:] == [0, -1, -2]
    with pytest.raises(RequestError, match="the merges that make 'abc' are not together"):
        tables(merging(("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")))


def test_metaspace_is_a_prefix_space_with_a_note(build):
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    values, notes = tables(described(build.sentencepiece(True), normalizer=None, pre_tokenizer=space))
    assert values["add_space_prefix"] is True and "after a special token" in notes[0]


def characters(**changes):
    words = ["<unk>", "<s>", "</s>", *" abcdefg\n"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return described(tokenizer, **changes) if changes else tokenizer


def test_a_tokenizer_of_characters():
    values, notes = tables(characters())
    assert values["model"] == "t5" and values["tokens"][3:6] == ["▁", "a", "b"] and values["tokens"][-1] == "\n"
    assert values["token_type"] == [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 9] and len(set(values["scores"])) == 1
    assert values["add_space_prefix"] is False and "one unknown token" in notes[0]
    core = json.loads(characters().backend_tokenizer.to_str())["model"]
    with pytest.raises(RequestError, match="'ab' is a token that this tokenizer never makes"):
        tables(characters(model=core | {"vocab": core["vocab"] | {"ab": 12}}))
    with pytest.raises(RequestError, match="two tokens are both '▁'"):
        tables(characters(model=core | {"vocab": core["vocab"] | {"▁": 12}}))


def test_wordpiece_is_refused():
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(RequestError, match="a tokenizer of kind WordPiece with nothing before it"):
        tables(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"))


def test_what_is_added_to_a_text_and_what_ends_an_answer(build):
    tokenizer = build.byte_level(build.QWEN2, ignore_merges=False, bos=True)
    values, _ = tables(tokenizer, stops=[1, 2])
    assert (values["bos_token_id"], values["eos_token_id"], values["eot_token_id"]) == (0, 1, 2)
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False) and "eom_token_id" not in values
    assert "[5]" in tables(tokenizer, stops=[1, 2, 4, 5])[1][-1]
    values, _ = tables(build.byte_level(build.QWEN2, ignore_merges=False, bos=False))
    assert values["add_bos_token"] is False and "bos_token_id" not in values
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    with pytest.raises(RequestError, match=r"puts \['<\|user\|>'\] before a text"):
        tables(tokenizer)


def test_the_chat_template_goes_out_without_what_only_transformers_knows(build):
    import jinja2

    tokenizer = build.sentencepiece(True)
    values, _ = tables(tokenizer)
    messages = [{"role": "user", "content": "  hi "}, {"role": "user", "content": "you"}]
    told = jinja2.Environment().from_string(values["chat_template"]).render(messages=messages)
    assert told == tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>  hi <|user|>you"
    tokenizer.chat_template = {"default": "a", "tool_use": build.TEMPLATE}
    values, _ = tables(tokenizer)
    assert values["chat_template"] == "a" and values["chat_templates"] == ["tool_use"]
    assert "generation" not in values["chat_template.tool_use"]
    tokenizer.chat_template = None
    assert not [key for key in tables(tokenizer)[0] if "chat" in key]


def test_a_token_that_takes_spaces_along_is_told(build):
    tokenizer = build.sentencepiece(True)
    tokenizer.add_tokens(AddedToken("<tool>", lstrip=True))
    assert "'<tool>' takes the spaces" in tables(tokenizer)[1][0]


def test_normalizers_are_not_forgotten_in_a_sequence(build):
    core = build.sentencepiece(True).backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.NFKC()])
    with pytest.raises(RequestError, match="the normalizer NFKC"):
        tables(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
