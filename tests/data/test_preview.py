"""What a person is shown: trained tokens told apart to the letter, and each kind of odd row found."""

from __future__ import annotations

from halfbyte.data import (
    IGNORE,
    Renderer,
    odd_labels,
    odd_rows,
    read_examples,
    read_judgments,
    read_labelled,
    read_preferences,
    shown_answers,
    shown_row,
    tokenize,
    tokenize_judgments,
    tokenize_preferences,
)


def talk(*answers):
    turns = [({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}) for answer in answers]
    return {"messages": [turn for pair in turns for turn in pair]}


def test_a_row_is_shown_as_the_model_sees_it(tiny_tokenizer, write_rows):
    data = tokenize(
        read_examples(write_rows([talk("yo", "by")])), Renderer(tiny_tokenizer), max_length=99, train_on="completion"
    )
    (row,) = data.dataset
    plain = shown_row(row["input_ids"], row["labels"], tiny_tokenizer, colour=False)
    asked = "<|user|>q</s>\n<|assistant|>"
    assert plain.plain == f"<s>{asked}⟦yo</s>⟧\n{asked}⟦by</s>⟧\n"
    coloured = shown_row(row["input_ids"], row["labels"], tiny_tokenizer)
    assert coloured.plain == tiny_tokenizer.decode(row["input_ids"])
    green = [coloured.plain[span.start : span.end] for span in coloured.spans if "green" in str(span.style)]
    assert green == ["yo</s>", "by</s>"]


def test_spaces_between_words_are_shown(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    ids = tokenizer("Once upon a time")["input_ids"]
    labels = [token if index > 3 else IGNORE for index, token in enumerate(ids)]
    shown = shown_row(ids, labels, tokenizer, colour=False).plain
    assert shown.replace("⟦", "").replace("⟧", "") == tokenizer.decode(ids)


def test_each_kind_of_odd_row_is_found(tiny_tokenizer, write_rows):
    rows = [
        talk("abc"),
        talk("abc"),
        talk("a"),
        talk("", "abcd"),
        talk("x" * 32),  # 39 tokens of 40
        talk("x" * 60),
        talk("abc"),
    ]
    path = write_rows(rows)
    examples = read_examples(path)

    def tokens(examples):
        return tokenize(examples, Renderer(tiny_tokenizer), max_length=40, train_on="completion")

    data = tokens(examples)
    assert data.facts.length.max() > 40
    odd = odd_rows(data, examples, 40, held_out=tokens(examples.take([2])))
    found = {oddity.what: (oddity.count, oddity.where) for oddity in odd}

    def at(*lines):
        return len(lines), tuple(f"{path}, line {line}" for line in lines)

    assert found == {
        "repeat an earlier row (3 times the same at most)": at(2, 7),
        "have 2 trained tokens or less": at(3),
        "are nearly as long as max_length": at(5),
        "are cut at max_length": at(6),
        "are measured on as well": at(3),
        "have an empty answer among others": at(4),
    }
    ordinary = examples.take([0])
    assert odd_rows(tokens(ordinary), ordinary, 40) == []


def test_odd_labels(write_rows):
    rows = [{"text": text, "label": label} for text, label in (("a", 0), ("b", 0), ("a", 0), ("a", 1))]
    path = write_rows(rows)
    same, contradicted = odd_labels(read_labelled(path))
    assert (same.count, same.where) == (1, (f"{path}, line 3",))
    assert (contradicted.count, contradicted.where) == (1, (f"{path}, line 4",))


def coloured(text, style):
    return [text.plain[span.start : span.end] for span in text.spans if style in str(span.style)]


def test_both_answers_of_a_pair_are_shown(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "q", "chosen": "yo", "rejected": "no"}])
    (row,) = tokenize_preferences(read_preferences(path), Renderer(tiny_tokenizer), max_length=99).dataset
    shown = shown_answers(row, tiny_tokenizer)
    assert shown.plain == "<s><|user|>q</s>\n<|assistant|>\nchosen: yo</s>\nrejected: no</s>"
    assert (coloured(shown, "green"), coloured(shown, "red")) == (["yo</s>"], ["no</s>"])


def test_a_judged_answer_is_shown_by_its_judgment(tiny_tokenizer, write_rows):
    path = write_rows([{"prompt": "q", "completion": "yo", "label": label} for label in (True, False)])
    good, bad = tokenize_judgments(read_judgments(path), Renderer(tiny_tokenizer), max_length=99).dataset
    asked = "<s><|user|>q</s>\n<|assistant|>"
    assert shown_answers(good, tiny_tokenizer, colour=False).plain == f"{asked}\ngood: ⟦yo</s>⟧"
    shown = shown_answers(bad, tiny_tokenizer)
    assert shown.plain == f"{asked}\nbad: yo</s>"
    assert (coloured(shown, "green"), coloured(shown, "red")) == ([], ["yo</s>"])


def test_odd_pairs_are_found_at_their_lines(tiny_tokenizer, write_rows):
    """The first row is dropped, so places among the rows are not places among the examples."""
    answers = [("x" * 60, "a", "b"), ("q", "yes", "no"), ("q", "", "no"), ("q", "yes", "no"), ("q", "yesn", "o")]
    path = write_rows([{"prompt": p, "chosen": c or "c", "rejected": r} for p, c, r in answers])
    examples = read_preferences(path)
    data = tokenize_preferences(examples, Renderer(tiny_tokenizer), max_length=40)
    found = {oddity.what: oddity.where for oddity in odd_rows(data, examples, 40)}
    assert found == {
        "repeat an earlier row (2 times the same at most)": (f"{path}, line 4",),
        "have 2 trained tokens or less": (f"{path}, line 3", f"{path}, line 5"),
    }


def test_real_judgments_are_shown(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    examples = read_judgments(assets / "instruct" / "llama-factory" / "kto_en_demo.json").take(range(14))
    data = tokenize_judgments(examples, Renderer(tokenizer), max_length=2048)
    assert data.report.dropped  # so a row's place is not its example's
    listed, named = list(examples), set()
    for origin, row in zip(data.facts.origin, data.dataset, strict=True):
        example = listed[origin]
        shown = shown_answers(row, tokenizer, colour=False).plain
        name = "good" if example.label else "bad"
        assert f"\n{name}: ⟦" in shown and example.completion[0]["content"].strip()[:20] in shown
        named.add(name)
    assert named == {"good", "bad"}
