"""Messages into token ids: the one renderer of training and inference.

A model that was trained on one rendering of a conversation and is asked through another loses quality without a word.
So there is one class for both, and it has four properties worth knowing.

* **The chat template is in full charge of special tokens.** Rendered text is encoded with `add_special_tokens=False`,
  always; a tokenizer that puts its own BOS in front of the template's cannot do so here.
* **An answer's span is known before it is cut into tokens.** Where the template has generation markers they give the
  spans. Elsewhere the conversation is rendered up to each answer and up to its end, and both must be prefixes of the
  whole.
* **A template that rewrites earlier turns is followed.** Templates of reasoning models drop the thoughts of all answers
  but the last, so that no rendering of the whole holds what the model will have seen and said. Each answer then becomes
  a row of its own, rendered as it will be at inference: all turns before it, as the template shows them at that point.
* **The token that ends an answer is trained, and is the one that stops generation.** A template may put it outside its
  generation markers, and follow it with a line break; the mask is corrected to end exactly on it.

Tokens are matched to spans by character offsets, so a fast tokenizer is needed (transformers' slow ones are gone).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.conversations import Example
from halfbyte.data.problems import Problems
from halfbyte.data.turns import Message, calls_as_text
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that is not trained; the value torch and transformers agree on

# For tokenizers without a template, base models mostly. Plain words, since such a tokenizer has no role tokens, and an
# end token after every answer, since without one nothing would teach the model to stop. The prompt ends in a line break
# and not in a space: most tokenizers join a space to the word behind it, and the first word of an answer would be half
# given.
DEFAULT_TEMPLATE = """\
{{- bos_token or '' -}}
{%- if tools -%}{{- 'Tools: ' + tools | tojson + '\\n' -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'Assistant:\\n' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
_MARKER = re.compile(r"\{%-?\s*generation\b")
_QUESTION: Message = {"role": "user", "content": "a"}
_ANSWER: Message = {"role": "assistant", "content": "b"}
_PROBE = "halfbyte_probe"  # the name of a tool that no template mentions by itself

Tools = Sequence[dict[str, Any]]
Span = tuple[int, int]  # from and to, in characters


@dataclass(frozen=True)
class Layout:
    """The text of a row, and which spans of it are trained, ascending; None: all of it."""

    where: str
    text: str
    spans: Sequence[Span] | None


@dataclass(frozen=True)
class Rendered:
    """A row of token ids, int32, and which of them are trained, bool, equally long."""

    ids: np.ndarray
    trained: np.ndarray


class Renderer:
    """Turns conversations into token ids, for training with a mask and for generation without.

    Args:
        tokenizer: a fast tokenizer. One without a chat template is given `DEFAULT_TEMPLATE`, so that the template is
            saved with it and every later program renders the same.

    Raises:
        DataError: the tokenizer is not fast, or nothing is known that ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise DataError(f"the tokenizer of {name} has no fast version, and offsets are needed for the loss mask.")
        if tokenizer.chat_template is None:
            if tokenizer.eos_token is None:
                raise DataError(f"the tokenizer of {name} has neither a chat template nor an end token (eos_token).")
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template()
        self._marked = _MARKER.search(self.template) is not None
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self.stop_ids = self._find_stop_ids()  #: any of these ends an answer

    def _find_stop_ids(self) -> list[int]:
        """What ends an answer in training, and the tokenizer's own end token.

        A template that cannot be trained on (it raises for each row, there) can still be generated with.
        """
        found = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        try:
            (row,) = self.training_rows(Example("the chat template", (_QUESTION, _ANSWER)))
        except DataError:
            if not found:
                raise
            return found
        end = np.flatnonzero(row.trained)[-1]
        return list(dict.fromkeys([int(row.ids[end]), *found]))

    @property
    def digest(self) -> str:
        """SHA-256 of the template, in hexadecimal: equal digests mean equal renderings."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def prompt_is_whole(self) -> bool:
        """Whether the tokens of a prompt are those that training shows before an answer.

        Where the prompt ends within a token (a space that the tokenizer joins to the first word of the answer), a model
        is asked through other tokens than it was trained on, and the first word of its answers was never trained.
        """
        talk = Example("", (_QUESTION, {"role": "assistant", "content": "The answer."}))
        try:
            prompt, row = self.ids(talk.messages[:1], prompt=True), self.training_rows(talk)[0]
        except DataError:
            return True  # told for each row
        return row.ids[: int(row.trained.argmax())].tolist() == prompt

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template tells the model which tools there are."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
        return self._shows((_QUESTION, _ANSWER), [tool])

    @cached_property
    def shows_tool_calls(self) -> bool:
        """Whether the template writes the calls of an assistant's turn. Where not, they are written as JSON."""
        call = {"type": "function", "function": {"name": _PROBE, "arguments": {}}}
        return self._shows((_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}), ())

    def _shows(self, messages: Sequence[Message], tools: Tools) -> bool:
        try:
            return _PROBE in self._render(messages, tools, prompt=False)
        except DataError:
            return False

    def text(self, messages: Sequence[Message], *, prompt: bool, tools: Tools = ()) -> str:
        """The rendered conversation; with `prompt`, followed by the words that open the assistant's turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._render(self._writable(messages), tools, prompt=prompt)

    def ids(self, messages: Sequence[Message], *, prompt: bool, tools: Tools = ()) -> list[int]:
        """Token ids of `text(messages, prompt=prompt, tools=tools)`."""
        return self.tokenizer(self.text(messages, prompt=prompt, tools=tools), add_special_tokens=False)["input_ids"]

    def training_rows(self, example: Example, train_on: str = "completion") -> list[Rendered]:
        """Token ids of a conversation, and which of them are trained: `layouts`, encoded.

        Raises:
            DataError: see `layouts` and `encode`.
        """
        return self.encode(self.layouts(example, train_on), Problems.raising())

    def layouts(self, example: Example, train_on: str = "completion") -> list[Layout]:
        """The text of a conversation, and which spans of it are trained.

        Args:
            example: a conversation.
            train_on: "completion": the answers, without those that are part of a given prompt; "all_assistant": every
                assistant turn; "last_turn": the last assistant turn; "all": every token.

        Returns:
            One text; or one for each answer, where the template rewrites earlier turns.

        Raises:
            DataError: the template cannot render the conversation, or none of its answers is to be trained.
        """
        try:
            messages = self._writable(example.messages)
            if train_on == "all":
                return [Layout(example.where, self._render(messages, example.tools, prompt=False), None)]
            turns = _wanted(example, train_on)
            found = self._marked_spans if self._marked else self._prefix_spans
            whole, spans = found(messages, turns, example.tools)
            known = [span for span in spans if span is not None]
            if len(known) == len(spans):
                return [Layout(example.where, whole, known)]
            return [self._layout_of_last(messages[: turn + 1], example) for turn in turns]
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from error

    def encode(self, layouts: Sequence[Layout], problems: Problems) -> list[Rendered]:
        """Token ids of texts, and which of them are trained.

        Args:
            layouts: see there.
            problems: takes texts that end an answer without an end token, or of which no token would be trained.
        """
        if not layouts:
            return []
        encoded = self.tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        rows = []
        for layout, ids, encoding in zip(layouts, encoded["input_ids"], encoded.encodings or (), strict=True):
            with problems.collect():
                rows.append(self._row(layout, np.array(ids, dtype=np.int32), encoding))
        return rows

    def _writable(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the template's means: tool calls that it does not know become text."""
        if self.shows_tool_calls or not any("tool_calls" in message for message in messages):
            return list(messages)
        written = []
        for message in messages:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            if "tool_calls" in message:
                parts = [message["content"], calls_as_text(message["tool_calls"])]
                rest["content"] = "\n".join(part for part in parts if part)
            written.append(rest)
        return written

    def _render(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        return self._render_with_spans(messages, tools, prompt=prompt, spans=False)[0]

    def _render_with_spans(
        self, messages: Sequence[Message], tools: Tools, *, prompt: bool, spans: bool
    ) -> tuple[str, list[Span]]:
        """The rendered text, and where its generation markers stand."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        special: Any = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **special,
            )
        except (TemplateError, TypeError, KeyError) as error:  # a template may add None to a text
            raise DataError(f"the chat template refuses the conversation: {str(error).rstrip('.')}.") from error
        (text,), marked = rendered  # its annotation says str
        return text, marked[0] if spans else []

    def _marked_spans(
        self, messages: list[Message], turns: list[int], tools: Tools
    ) -> tuple[str, Sequence[Span | None]]:
        """The rendered text, and the spans of `turns` from the template's own markers."""
        whole, found = self._render_with_spans(messages, tools, prompt=False, spans=True)
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(found) != len(said):
            raise DataError(
                f"the generation markers of the chat template enclose {len(found)} of the {len(said)} answers."
            )
        return whole, [found[said.index(turn)] for turn in turns]

    def _prefix_spans(
        self, messages: list[Message], turns: list[int], tools: Tools
    ) -> tuple[str, Sequence[Span | None]]:
        """The rendered text, and the spans of `turns` from the lengths of what leads to them."""
        whole = self._render(messages, tools, prompt=False)
        return whole, [self._span(messages, turn, whole, tools) for turn in turns]

    def _span(self, messages: list[Message], turn: int, whole: str, tools: Tools) -> Span | None:
        """Where a turn stands in the text; None where the whole does not begin with what leads to it."""
        before = self._render(messages[:turn], tools, prompt=True)
        last = turn + 1 == len(messages)
        after = whole if last else self._render(messages[: turn + 1], tools, prompt=False)
        if whole.startswith(before) and whole.startswith(after) and len(before) < len(after):
            return len(before), len(after)
        return None

    def _layout_of_last(self, messages: list[Message], example: Example) -> Layout:
        """A conversation whose last turn alone is trained."""
        whole = self._render(messages, example.tools, prompt=False)
        span = self._span(messages, len(messages) - 1, whole, example.tools)
        if span is None:
            raise DataError(
                f"the chat template renders what leads to turn {len(messages)} differently when the answer follows, so "
                "its tokens cannot be told apart; use a template with {% generation %} markers, or train_on: all."
            )
        return Layout(example.where, whole, [span])

    def _row(self, layout: Layout, ids: np.ndarray, encoding: Encoding) -> Rendered:
        trained = np.full(len(ids), layout.spans is None)
        for span in layout.spans or ():
            first, after = _tokens_in(span, encoding)
            if first < after:
                trained[first : self._after_stop(ids, first, after, layout.where)] = True
        if not trained[1:].any():  # the first token of a row is never predicted
            raise DataError(f"{layout.where}: no token of this row would be trained on; its answer renders to nothing.")
        return Rendered(ids, trained)

    def _after_stop(self, ids: np.ndarray, first: int, after: int, where: str) -> int:
        """Where an answer's tokens end: behind the last special one in it, or behind the one that follows it."""
        last = next((i for i in range(after - 1, first - 1, -1) if int(ids[i]) in self._special), None)
        if last is not None and self._is_blank(ids[last + 1 : after]):
            return last + 1
        if after < len(ids) and int(ids[after]) in self._special:
            return after + 1
        raise DataError(
            f"{where}: the chat template puts no end token after an answer, so the model could not learn to stop; add "
            "eos_token to the template."
        )

    def _is_blank(self, ids: np.ndarray) -> bool:
        return not len(ids) or not str(self.tokenizer.decode(ids.tolist())).strip()


def _tokens_in(span: Span, encoding: Encoding) -> tuple[int, int]:
    """From and to of the tokens that lie within a span of characters; an empty range where there are none.

    Only the two ends are looked up: lists of all offsets would take longer to make than the tokens themselves.
    """
    start, end = span
    first = next((t for t in map(encoding.char_to_token, range(start, end)) if t is not None), None)
    if first is None:
        return 0, 0
    # A token that straddles the start of an answer holds a piece of the prompt: it is given, not asked for.
    first += _chars(encoding, first)[0] < start
    after = next(t for t in map(encoding.char_to_token, range(end - 1, start - 1, -1)) if t is not None) + 1
    # A character may have several tokens, its bytes; the one that was found is the first of them.
    while after < len(encoding) and start <= _chars(encoding, after)[0] < _chars(encoding, after)[1] <= end:
        after += 1
    if _chars(encoding, after - 1)[1] > end:
        after -= 1
    return first, max(first, after)


def _chars(encoding: Encoding, token: int) -> Span:
    """The characters of a token; an empty span for one that stands for none."""
    return encoding.token_to_chars(token) or (0, 0)


def _wanted(example: Example, train_on: str) -> list[int]:
    """The assistant's turns that are trained.

    Raises:
        DataError: there are none.
    """
    first = example.prompt_turns if train_on == "completion" else 0
    turns = [
        index
        for index, message in enumerate(example.messages)
        if message["role"] == "assistant" and index >= first and index not in example.unweighted
    ]
    if train_on == "last_turn":
        said = max((index for index, message in enumerate(example.messages) if message["role"] == "assistant"))
        turns = [index for index in turns if index == said]
    if not turns:
        raise DataError(f"none of the answers is trained with train_on: {train_on}.")
    return turns
