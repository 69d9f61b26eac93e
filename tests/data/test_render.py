"""Loss masks by `train_on`, templates that rewrite what came before, tools, and one BOS."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data import Example, Renderer
from halfbyte.errors import DataError

TURN = "<|{{ m.role }}|>"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{{ bos_token }}{% for m in messages %}" + TURN + "{{ m.content }}{{ eos_token }}\n{% endfor %}" + OPEN
MARKED = (
    "{{ bos_token }}{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}" + OPEN
)
# As templates of reasoning models do: the thoughts of an answer are gone once another question follows.
THINKING = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('#')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}" + OPEN
)
# As Llama 2's: no words that open an answer, and white space around a content is gone.
TRIMMING = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]{% else %}"
    " {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
CALLING = (
    "{% if tools %}{% for t in tools %}({{ t.function.name }}){% endfor %}{% endif %}{% for m in messages %}" + TURN
    + "{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}" + OPEN
)  # fmt: skip


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def said(*turns):
    """Turns by turns: the user, the assistant, the user, ..."""
    return tuple({"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(turns))


def trained(renderer, example, train_on):
    """What is trained, decoded, for each row."""
    rows = renderer.training_rows(example, train_on)
    return [renderer.tokenizer.decode(row.ids[row.trained].tolist()) for row in rows]


TALK = said("hi", "yo", "ok", "by")
CASES = {
    "completion": (Example("row", TALK), "completion", "yo</s>by</s>"),
    "completion behind a prompt": (Example("row", TALK, prompt_turns=3), "completion", "by</s>"),
    "completion, one weighs nothing": (Example("row", TALK, unweighted=frozenset({1})), "completion", "by</s>"),
    "all_assistant": (Example("row", TALK, prompt_turns=3), "all_assistant", "yo</s>by</s>"),
    "last_turn": (Example("row", TALK), "last_turn", "by</s>"),
    "last_turn, a question after it": (Example("row", (*TALK, TALK[0])), "last_turn", "by</s>"),
}


@pytest.mark.parametrize("template", [PLAIN, MARKED, None, TRIMMING])
@pytest.mark.parametrize("name", CASES)
def test_what_is_trained(tiny_tokenizer, template, name):
    example, train_on, expected = CASES[name]
    renderer = Renderer(with_template(tiny_tokenizer, template))
    (text,) = trained(renderer, example, train_on)
    assert text.replace(" ", "") == expected  # TRIMMING puts spaces around an answer, which are part of it


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING])
def test_all_trains_every_token(tiny_tokenizer, template):
    (row,) = Renderer(with_template(tiny_tokenizer, template)).training_rows(Example("row", TALK), "all")
    assert all(row.trained)


@pytest.mark.parametrize("train_on", ["completion", "all_assistant", "last_turn"])
def test_a_rewriting_template_gives_each_answer_its_own_row(tiny_tokenizer, train_on):
    """Every row is what inference shows at that turn, to the token, and the answer whole, thoughts included."""
    renderer = Renderer(with_template(tiny_tokenizer, THINKING))
    talk = said("hi", "hm#yo", "ok", "so#by")
    rows = renderer.training_rows(Example("row", talk), train_on)
    turns = [3] if train_on == "last_turn" else [1, 3]
    assert len(rows) == len(turns)
    for row, turn in zip(rows, turns, strict=True):
        first = row.trained.argmax()
        assert row.ids[:first].tolist() == renderer.ids(talk[:turn], prompt=True)
        assert renderer.tokenizer.decode(row.ids[first:].tolist()) == talk[turn]["content"] + "</s>"
        assert all(row.trained[first:])


def test_a_template_that_opens_answers_differently_is_refused(tiny_tokenizer):
    """Where the words that open an answer are not those of the rendered answer, no span can be told."""
    template = PLAIN.replace(OPEN, "{% if add_generation_prompt %}<|assistant|>think{% endif %}")
    with pytest.raises(DataError, match=r"^rows, line 3: the chat template renders what leads to turn 2 differently"):
        Renderer(with_template(tiny_tokenizer, template)).training_rows(Example("rows, line 3", TALK))


def test_markers_that_miss_an_answer_are_refused(tiny_tokenizer):
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(DataError, match=r"^row: the generation markers of the chat template enclose 1 of the 2"):
        Renderer(with_template(tiny_tokenizer, template)).training_rows(Example("row", TALK))


@pytest.mark.parametrize(
    ("example", "train_on"),
    [
        (Example("row", TALK, unweighted=frozenset({1, 3})), "completion"),
        (Example("row", TALK, unweighted=frozenset({3})), "last_turn"),
    ],
)
def test_a_row_without_a_trained_token_is_an_error_with_its_line(tiny_tokenizer, example, train_on):
    with pytest.raises(DataError, match=rf"^row: none of the answers is trained with train_on: {train_on}"):
        Renderer(tiny_tokenizer).training_rows(example, train_on)


def test_a_template_that_does_not_show_the_answer_is_an_error(tiny_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"^row: "):
        Renderer(with_template(tiny_tokenizer, template)).training_rows(Example("row", TALK))


TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
CALLED = Example(
    "row",
    (
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "a"},
    ),
    tools=(TOOL,),
)


def test_tools_and_calls_reach_a_template_that_shows_them(tiny_tokenizer):
    renderer = Renderer(with_template(tiny_tokenizer, CALLING))
    assert renderer.shows_tools
    assert renderer.shows_tool_calls
    assert renderer.text(CALLED.messages, prompt=False, tools=CALLED.tools).startswith("(add)")
    assert trained(renderer, CALLED, "completion") == ['!add{"x": 1}</s>a</s>']


def test_calls_become_text_where_the_template_does_not_write_them(tiny_tokenizer):
    """They would otherwise be an answer of nothing but its end."""
    renderer = Renderer(with_template(tiny_tokenizer, PLAIN))
    assert not renderer.shows_tools
    assert not renderer.shows_tool_calls
    call = json.dumps({"name": "add", "arguments": {"x": 1}})
    assert trained(renderer, CALLED, "completion") == [f"{call}</s>a</s>"]
    before = renderer.ids(CALLED.messages[:3], prompt=True)
    assert renderer.training_rows(CALLED)[0].ids[: len(before)].tolist() == before  # inference writes them the same way


def test_the_default_template_shows_tools(tiny_tokenizer):
    renderer = Renderer(with_template(tiny_tokenizer, None))
    assert renderer.shows_tools
    assert '"name": "add"' in renderer.text(CALLED.messages, prompt=False, tools=CALLED.tools)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    turns=st.lists(st.text("ab #", min_size=1, max_size=6).filter(str.strip), min_size=2, max_size=6),
    template=st.sampled_from([PLAIN, MARKED, THINKING, None]),
    train_on=st.sampled_from(["completion", "all_assistant", "last_turn"]),
)
def test_whatever_is_said_training_shows_what_inference_shows(tiny_tokenizer, turns, template, train_on):
    """For all conversations: up to an answer the tokens are those of the prompt at inference, and it ends in a stop."""
    talk = said(*turns)
    renderer = Renderer(with_template(tiny_tokenizer, template))
    for row in renderer.training_rows(Example("row", talk), train_on):
        starts = [i for i, on in enumerate(row.trained) if on and not row.trained[i - 1]]
        ends = [i for i, on in enumerate(row.trained) if on and (i + 1 == len(row.ids) or not row.trained[i + 1])]
        assert all(row.ids[end] in renderer.stop_ids for end in ends)
        prompts = [renderer.ids(talk[:turn], prompt=True) for turn in range(1, len(talk), 2)]
        assert all(row.ids[:start].tolist() in prompts for start in starts)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from("ab cé语\n🙂"), min_size=1, max_size=20), st.integers(0, 19), st.integers(0, 20))
def test_a_span_has_the_tokens_that_lie_within_it(assets, text, start, end):
    """As all offsets say it; also where a character has several tokens, and where a token has several characters."""
    from transformers import AutoTokenizer

    from halfbyte.data.render import _tokens_in

    start %= len(text)
    end = start + 1 + end % (len(text) - start)
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    inside = [n for n, (a, b) in enumerate(encoded["offset_mapping"][0]) if start <= a < b <= end]
    first, after = _tokens_in((start, end), encoded.encodings[0])
    assert list(range(first, after)) == inside
