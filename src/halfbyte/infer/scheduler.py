"""Continuous batching: who gets a slot of the cache, and which tokens go through the model together.

One thread goes round: requests that were cancelled leave, waiting ones take free slots, one prompt is read on by a
chunk, and every sequence that is past its prompt gets its next token in one step. So a long prompt delays the others
by a chunk and not by its length, and an answer that ends makes room at once.

A slot keeps its tokens when its answer is done. A request whose prompt begins with tokens that some slot holds,
computed under the same adapters, starts behind them: in that slot if it is free, else from a copy. So a system prompt
is read once.

With `drafts`, a greedy sequence proposes how it might go on (`lookup.py`). The proposal is verified by the same step,
as rows of its own, and only what the model itself would have written is kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.errors import BusyError
from halfbyte.infer.lookup import PromptLookup
from halfbyte.infer.requests import Adapters, Request
from halfbyte.kernels.decoder import STEP_ROWS, Mix

CHUNK = 256  # tokens of a prompt that are read between two steps of the others
CHUNK_ALONE = {"cpu": 512, "cuda": 2048}  # where nobody is being answered; a card decodes all weights for each chunk
FEW = 32  # a rest of a prompt that is no longer goes through the step of decoding, with the others' tokens
_IDLE = 0.5  # seconds that an idle thread sleeps before it looks whether it is to end


@dataclass
class Slot:
    """A place in the cache: the tokens whose keys and values it holds, and for whom."""

    number: int
    tokens: list[int] = field(default_factory=list)
    adapters: Adapters = ()
    request: Request | None = None
    used_at: float = 0.0

    @property
    def rest(self) -> list[int]:
        """Tokens of its request that it does not hold yet; the last of them is what the next choice follows."""
        if self.request is None:
            return []
        prompt, written, held = self.request.prompt, self.request.written, len(self.tokens)
        return prompt[held:] + written if held < len(prompt) else written[held - len(prompt) :]

    def shares(self, request: Request) -> int:
        """How many tokens of the request's prompt it holds; the last one has to be computed in any case."""
        if self.adapters != request.adapters:
            return 0
        most = min(len(self.tokens), len(request.prompt) - 1)
        for index in range(most):
            if self.tokens[index] != request.prompt[index]:
                return index
        return most


@dataclass
class Statistics:
    """Counts since the engine began."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"prompt": 0.0, "step": 0.0, "sampling": 0.0})
    parts: dict[str, float] = field(default_factory=dict)  # of the decoders' own time; filled in by `Engine.snapshot`


class Scheduler:
    """Runs requests on a decoder, in a thread of its own.

    Args:
        decode: takes tokens through the model: `Decoder.step`.
        read: the same for many tokens of one prompt; None: `decode` does both.
        copy: gives a slot the first tokens of another; None: a slot's tokens cannot be kept.
        slots: sequences at a time.
        queue_limit: requests that may wait.
        drafts: tokens of a draft; 0: none.
        numbers: adapters' numbers by name.
        chunk: tokens of a prompt that are read at a time where nobody is being answered.
    """

    def __init__(
        self,
        decode: Callable[..., torch.Tensor],
        read: Callable[..., torch.Tensor] | None,
        copy: Callable[[int, int, int], None] | None,
        slots: int,
        queue_limit: int,
        drafts: int,
        numbers: Callable[[Adapters], Mix],
        chunk: int,
    ) -> None:
        self._chunk = chunk
        self._decode, self._read, self._copy, self._numbers = decode, read, copy, numbers
        self._drafts = drafts if copy is not None else 0
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: deque[Request] = deque()
        self._limit = queue_limit
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], Any], threading.Event, list[Any]]] = deque()
        self._closing = False
        self.statistics = Statistics()
        self._thread = threading.Thread(target=self._go_round, name="halfbyte-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(slot.request is not None for slot in self._slots)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BusyError: the queue is full, or the engine is closed.
        """
        with self._changed:
            if self._closing:
                raise BusyError("the engine is closed.")
            if len(self._waiting) >= self._limit + len(self._slots) - self.running:
                raise BusyError(f"{len(self._waiting)} requests are waiting, which is the limit; try again later.")
            self._waiting.append(request)
            self.statistics.requests += 1
            self._changed.notify()

    def between_steps(self, action: Callable[[], Any]) -> Any:
        """Run `action` while nothing is being computed, and return its result; its exception is raised here."""
        done = threading.Event()
        outcome: list[Any] = []
        with self._changed:
            if self._closing:
                raise BusyError("the engine is closed.")
            self._orders.append((action, done, outcome))
            self._changed.notify()
        done.wait()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def uses(self, name: str) -> bool:
        """Whether a request that waits or runs names this adapter; to be called between steps."""
        with self._changed:
            requests = [*self._waiting, *(slot.request for slot in self._slots)]
        return any(adapter == name for request in requests if request is not None for adapter, _ in request.adapters)

    def forget(self, name: str) -> None:
        """Drop what slots hold of an adapter that is no more; to be called between steps."""
        for slot in self._slots:
            if any(adapter == name for adapter, _ in slot.adapters):
                slot.tokens = []

    def logits(self, tokens: list[int], adapters: Adapters) -> torch.Tensor:
        """Logits [tokens, vocabulary] after each token; to be called between steps.

        Raises:
            BusyError: no slot is free.
        """
        slot = next((slot for slot in self._slots if slot.request is None), None)
        if slot is None:
            raise BusyError("every slot is answering a request; try again later.")
        slot.tokens = []  # what it held is overwritten
        found = []
        for begin in range(0, len(tokens), STEP_ROWS):
            chunk = tokens[begin : begin + STEP_ROWS]
            positions = list(range(begin, begin + len(chunk)))
            mixes = [self._numbers(adapters)] * len(chunk) if adapters else None
            with torch.inference_mode():
                found.append(self._decode(chunk, [slot.number] * len(chunk), positions, mixes))
        return torch.cat(found)

    def close(self) -> None:
        """End all requests as cancelled and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _go_round(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self.running or self._orders or self._closing):
                    self._changed.wait(_IDLE)
                if self._closing:
                    break
            self._obey()
            try:
                self._sweep()
                self._admit()
                with torch.inference_mode():
                    self._advance()
            except Exception as error:
                # Nobody knows what the slots hold now. Those who wait for an answer have to hear of it.
                for slot in self._slots:
                    if slot.request is not None:
                        slot.request.fail(error)
                    slot.request, slot.tokens = None, []
        for request in [*self._waiting, *(slot.request for slot in self._slots)]:
            if request is not None:
                request.end("cancelled")
        for _, done, outcome in self._orders:
            outcome.append(BusyError("the engine is closed."))
            done.set()

    def _obey(self) -> None:
        while self._orders:
            action, done, outcome = self._orders.popleft()
            try:
                outcome.append(action())
            except Exception as error:
                outcome.append(error)
            done.set()

    def _sweep(self) -> None:
        """Let go of requests whose reader has left."""
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled.is_set():
                slot.request.end("cancelled")
                slot.request = None
        with self._changed:
            gone = [request for request in self._waiting if request.cancelled.is_set()]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            request.end("cancelled")

    def _admit(self) -> None:
        """Give free slots to waiting requests, first come, first served."""
        while True:
            free = [slot for slot in self._slots if slot.request is None]
            with self._changed:
                if not free or not self._waiting:
                    return
                request = self._waiting.popleft()
            best = max(self._slots, key=lambda slot: slot.shares(request)) if self._copy else free[0]
            count = best.shares(request) if self._copy else 0
            if count and best.request is None:
                slot = best
            else:
                # Of those that are free, the one whose tokens were used least recently, or that has none.
                slot = min(free, key=lambda slot: (bool(slot.tokens), slot.used_at))
                if count and self._copy is not None:
                    self._copy(best.number, slot.number, count)
            slot.tokens, slot.adapters, slot.request = request.prompt[:count], request.adapters, request
            request.cached = count
            self.statistics.cached_tokens += count
            self.statistics.prompt_tokens += len(request.prompt)

    def _advance(self) -> None:
        """Read one chunk of one prompt, then decode for every sequence of which little or nothing is left to read."""
        reading = [slot for slot in self._slots if len(slot.rest) > FEW]
        if reading:
            self._read_chunk(min(reading, key=lambda slot: slot.request.asked_at if slot.request else 0.0))
        ready = [slot for slot in self._slots if 0 < len(slot.rest) <= FEW]
        while ready:
            taken = self._step(ready)
            ready = ready[taken:]

    def _read_chunk(self, slot: Slot) -> None:
        """Read on in a long prompt; its last chunk brings the first token of the answer."""
        request, rest, begin = slot.request, slot.rest, len(slot.tokens)
        assert request is not None
        most = CHUNK if any(other.request and other.request.written for other in self._slots) else self._chunk
        count = len(rest) if len(rest) <= most + FEW else most
        last = count == len(rest)
        started = time.monotonic()
        logits = (self._read or self._decode)(
            rest[:count],
            [slot.number] * count,
            list(range(begin, begin + count)),
            [self._numbers(request.adapters)] * count,
            (count - 1,) if last else (),
        )
        computed = time.monotonic()
        self.statistics.seconds["prompt"] += computed - started
        if last:
            self._take_or_fail(slot, rest, [], logits)
            self.statistics.seconds["sampling"] += time.monotonic() - computed
        else:
            slot.tokens += rest[:count]

    def _step(self, slots: Sequence[Slot]) -> int:
        """One token more for as many of `slots` as fit into a step; returns how many did."""
        tokens: list[int] = []
        numbers: list[int] = []
        positions: list[int] = []
        mixes: list[Mix] = []
        wanted: list[int] = []
        taken: list[tuple[Slot, list[int], list[int]]] = []
        prompts = 0
        for slot in slots:
            request, rest = slot.request, slot.rest
            assert request is not None
            if len(tokens) + len(rest) > STEP_ROWS:
                break
            draft = self._draft(request)[: STEP_ROWS - len(tokens) - len(rest)]
            taken.append((slot, rest, draft))
            prompts += 0 if request.written else len(rest)
            count = len(rest) + len(draft)
            wanted += range(len(tokens) + len(rest) - 1, len(tokens) + count)
            tokens += [*rest, *draft]
            numbers += [slot.number] * count
            positions += range(len(slot.tokens), len(slot.tokens) + count)
            mixes += [self._numbers(request.adapters)] * count
        started = time.monotonic()
        logits = self._decode(tokens, numbers, positions, mixes if any(mixes) else None, wanted)
        computed = time.monotonic()
        row = 0
        for slot, rest, draft in taken:
            self._take_or_fail(slot, rest, draft, logits[row : row + 1 + len(draft)])
            row += 1 + len(draft)
        self.statistics.steps += 1
        of_prompts = (computed - started) * prompts / len(tokens)
        self.statistics.seconds["prompt"] += of_prompts
        self.statistics.seconds["step"] += computed - started - of_prompts
        self.statistics.seconds["sampling"] += time.monotonic() - computed
        return len(taken)

    def _take_or_fail(self, slot: Slot, rest: list[int], draft: list[int], logits: torch.Tensor) -> None:
        try:
            self._take(slot, rest, draft, logits)
        except Exception as error:  # logits that are no numbers, say; the others' are their own
            if slot.request is not None:
                slot.request.fail(error)
            slot.request, slot.tokens = None, []

    def _take(self, slot: Slot, rest: list[int], draft: list[int], logits: torch.Tensor) -> None:
        """Choose tokens from a slot's rows: one, and one more for each drafted token that was chosen as well."""
        request = slot.request
        assert request is not None
        slot.tokens += rest
        for index in range(1 + len(draft)):
            choice = request.sampler.choose(logits[index])
            request.take(choice)
            self.statistics.written_tokens += 1
            if request.finished or index == len(draft) or choice.token != draft[index]:
                break
            slot.tokens.append(choice.token)
            self.statistics.accepted_tokens += 1
        self.statistics.drafted_tokens += len(draft)
        slot.used_at = time.monotonic()
        if request.finished:
            slot.request = None

    def _draft(self, request: Request) -> list[int]:
        if not self._drafts or request.params.temperature > 0:
            return []
        if request.lookup is None:
            request.lookup = PromptLookup(request.prompt)
        for token in request.written[request.lookup.length - len(request.prompt) :]:
            request.lookup.add(token)
        return request.lookup.draft(min(self._drafts, request.room - len(request.written) - 1))
