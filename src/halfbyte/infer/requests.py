"""A request on its way through the engine: what was asked, what has been written, and how its reader hears of it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream

from halfbyte.infer.lookup import PromptLookup
from halfbyte.infer.sampling import Choice, Sampler, SamplingParams

Adapters = tuple[tuple[str, float], ...]  # names and weights


@dataclass(frozen=True)
class Event:
    """Something that was written.

    Attributes:
        text: what follows the text of earlier events; may be empty where a token is no whole character yet.
        choices: the tokens behind it, or some that came earlier and whose text was held back.
        finish: None while there is more to come; "stop" (end token or stop text), "length", or "cancelled".
    """

    text: str
    choices: tuple[Choice, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without special tokens and without the stop text.
        choices: every token that was chosen, the one that ended the answer included.
        finish: "stop", "length" or "cancelled".
        prompt_tokens: of the prompt.
        cached_tokens: of the prompt that were in the cache already.
        seconds_to_first: from the request to its first token; waiting in the queue included.
        seconds: from the request to its last token.
    """

    text: str
    choices: tuple[Choice, ...]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    seconds_to_first: float
    seconds: float


class Handle:
    """A reader's end of a request: iterate over its events, or wait for `result`."""

    def __init__(self, request: Request, events: queue.SimpleQueue[Event | BaseException]) -> None:
        self._request, self._events = request, events

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that need not be computed; known from the first event on."""
        return self._request.cached

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.finish is not None:
                return

    def cancel(self) -> None:
        """Stop writing; the last event says "cancelled". Does nothing to a request that is done."""
        self._request.cancelled.set()

    def result(self) -> Completion:
        """Wait for the end."""
        texts: list[str] = []
        choices: list[Choice] = []
        finish = "cancelled"
        for event in self:
            texts.append(event.text)
            choices += event.choices
            finish = event.finish or finish
        request = self._request
        return Completion(
            "".join(texts),
            tuple(choices),
            finish,
            len(request.prompt),
            request.cached,
            (request.first_at or request.done_at) - request.asked_at,
            request.done_at - request.asked_at,
        )


@dataclass(eq=False)
class Request:
    """What was asked, and how far it is."""

    prompt: list[int]
    params: SamplingParams
    adapters: Adapters
    end_ids: frozenset[int]
    tokenizer: Any  # tokenizers.Tokenizer
    room: int  # tokens that the answer may have
    tell: Callable[[Event | BaseException], None]  # called by the engine's thread, which must not wait for it
    sampler: Sampler = field(init=False)
    cancelled: threading.Event = field(default_factory=threading.Event)
    written: list[int] = field(default_factory=list)
    cached: int = 0
    asked_at: float = field(default_factory=time.monotonic)
    first_at: float = 0.0
    done_at: float = 0.0
    finished: bool = False
    lookup: PromptLookup | None = None
    _held: str = ""  # text that may turn out to be the beginning of a stop text
    _pending: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params, self.prompt)
        self._decode = DecodeStream(skip_special_tokens=True)

    def take(self, choice: Choice) -> None:
        """Add a token to the answer and tell the reader; sets `finished` where it ends the answer."""
        if not self.first_at:
            self.first_at = time.monotonic()
        self.written.append(choice.token)
        self._pending.append(choice)
        if choice.token in self.end_ids and not self.params.ignore_end:
            return self._finish("stop", self._held)
        self._held += self._decode.step(self.tokenizer, choice.token) or ""
        at = min((i for i in (self._held.find(stop) for stop in self.params.stop) if i >= 0), default=-1)
        if at >= 0:
            return self._finish("stop", self._held[:at])
        if len(self.written) >= self.room:
            return self._finish("length", self._held + self._rest())
        keep = _possible_stop(self._held, self.params.stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if text:
            self._tell(text, None)
        return None

    def end(self, reason: str) -> None:
        """End it from outside."""
        self._finish(reason, self._held)

    def fail(self, error: BaseException) -> None:
        """End it with an exception, which the reader gets."""
        self.finished, self.done_at = True, time.monotonic()
        self._send(error)

    def _rest(self) -> str:
        """Characters that were cut off in the middle come as replacement characters, as in a decoded whole."""
        text = self.tokenizer.decode(self.written, skip_special_tokens=True)
        return "\ufffd" if text.endswith("\ufffd") and not self._held.endswith("\ufffd") else ""

    def _finish(self, reason: str, text: str) -> None:
        self.finished, self.done_at = True, time.monotonic()
        self._tell(text, reason)

    def _tell(self, text: str, finish: str | None) -> None:
        self._send(Event(text, tuple(self._pending), finish))
        self._pending.clear()

    def _send(self, event: Event | BaseException) -> None:
        """A reader that cannot be told has left; the others are not to suffer for it."""
        try:
            self.tell(event)
        except Exception:
            self.cancelled.set()


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def normalize_adapters(adapter: str | Mapping[str, float] | None) -> Adapters:
    """A request's adapters as sorted pairs; a name stands for weight 1."""
    if adapter is None:
        return ()
    if isinstance(adapter, str):
        return ((adapter, 1.0),)
    return tuple(sorted((name, float(weight)) for name, weight in adapter.items()))
