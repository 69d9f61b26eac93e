"""Messages into token ids: the one renderer of training and inference.

A model that was trained on one rendering of a conversation and is asked through another loses quality without a word.
So there is one class for both, and it has three properties worth knowing.

* **The chat template is in full charge of special tokens.** Rendered text is encoded with `add_special_tokens=False`,
  always; a tokenizer that puts its own BOS in front of the template's cannot do so here.
* **The answer's span is known before it is cut into tokens.** Where the template has generation markers they give the
  span. Elsewhere the conversation is rendered up to the answer and up to its end, both are checked to be prefixes of
  the whole, and the span lies between them; a template that rewrites earlier turns fails that check and is refused
  instead of training the wrong tokens.
* **The token that ends an answer is trained, and is the one that stops generation.** A template may put it outside its
  generation markers, and follow it with a line break; the mask is corrected to end exactly on it.

Tokens are matched to spans by character offsets, so a fast tokenizer is needed (transformers' slow ones are gone).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.data.conversations import Message
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that is not trained; the value torch and transformers agree on

# For tokenizers without a template, base models mostly. Plain words, since such a tokenizer has no role tokens, and an
# end token after every answer, since without one nothing would teach the model to stop.
DEFAULT_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'Assistant: ' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""
_MARKER = re.compile(r"\{%-?\s*generation\b")
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


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
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self.stop_ids = self._find_stop_ids()  #: any of these ends an answer

    def _find_stop_ids(self) -> list[int]:
        """What ends an answer in training, and the tokenizer's own end token.

        A template that cannot be trained on (it raises for each row, there) can still be generated with.
        """
        found = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        try:
            ids, mask = self.training_ids(_PROBE, "the chat template")
        except DataError:
            if not found:
                raise
            return found
        end = max(index for index, trained in enumerate(mask) if trained)
        return list(dict.fromkeys([ids[end], *found]))

    @property
    def digest(self) -> str:
        """SHA-256 of the template, in hexadecimal: equal digests mean equal renderings."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def text(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The rendered conversation; with `prompt`, followed by the words that open the assistant's turn."""
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}.") from error
        return str(text)

    def ids(self, messages: Sequence[Message], *, prompt: bool) -> list[int]:
        """Token ids of `text(messages, prompt=prompt)`."""
        return self.tokenizer(self.text(messages, prompt=prompt), add_special_tokens=False)["input_ids"]

    def training_ids(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them are the assistant's.

        Args:
            messages: the conversation.
            where: what an error message begins with.

        Returns:
            Two lists of equal length: ids, and True for each token of an answer including the one that ends it.

        Raises:
            DataError: the template cannot render the conversation, or it rewrites earlier turns, or it ends an answer
                without an end token.
        """
        ids = self.ids(messages, prompt=False)  # first, so that a refusal of the template is told in one place
        if _MARKER.search(self.template):
            encoded: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = encoded["input_ids"], [bool(bit) for bit in encoded["assistant_masks"]]
        else:
            mask = self._by_prefixes(messages, where)
        return ids, self._end_on_stop(ids, mask, where)

    def _by_prefixes(self, messages: Sequence[Message], where: str) -> list[bool]:
        """The mask from the lengths of rendered prefixes."""
        whole = self.text(messages, prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.text(messages[:index], prompt=True), self.text(messages[: index + 1], prompt=False)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                raise DataError(
                    f"{where}: the chat template renders turn {index + 1} differently when more turns follow, so its "
                    "tokens cannot be told apart; use a template with {% generation %} markers, or train_on: all."
                )
            spans.append((len(before), len(after)))
        offsets = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # A token that straddles the start of an answer holds a piece of the prompt: it is given, not asked for.
        return [start < end and any(a <= start and end <= b for a, b in spans) for start, end in offsets]

    def _end_on_stop(self, ids: list[int], mask: list[bool], where: str) -> list[bool]:
        """Make every run of trained tokens end on its end token: the last special one in it, or the one after it."""
        mask = list(mask)
        ends = [i for i, on in enumerate(mask) if on and (i + 1 == len(mask) or not mask[i + 1])]
        for end in ends:
            start = end
            while start and mask[start - 1]:
                start -= 1
            last = next((i for i in range(end, start - 1, -1) if ids[i] in self._special), None)
            if last is not None and not str(self.tokenizer.decode(ids[last + 1 : end + 1])).strip():
                mask[last + 1 : end + 1] = [False] * (end - last)
            elif end + 1 < len(ids) and ids[end + 1] in self._special:
                mask[end + 1] = True
            else:
                raise DataError(
                    f"{where}: the chat template puts no end token after an answer, so the model could not learn to "
                    "stop; add eos_token to the template."
                )
        return mask
