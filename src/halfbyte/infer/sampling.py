"""How the next token is chosen: the parameters, and the choice itself.

The order of the filters is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import RequestError

_GREEDY_BELOW = 1e-5  # of temperatures; logits divided by less may leave float32's range
_LARGEST = 1e30  # of penalized logits, for the same reason


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is written.

    Attributes:
        max_tokens: of the answer.
        temperature: 0 takes the likeliest token each time (greedy), and so does less than 0.00001.
        top_k: choose among so many of the likeliest; 0: among all.
        top_p: choose among the likeliest that together have this probability.
        min_p: drop tokens below this share of the likeliest one's probability.
        repetition_penalty: logits of tokens that were there already are divided by it if positive, else multiplied.
        stop: texts that end the answer, and are not part of it.
        seed: of the draws; None: another each time.
        logprobs: how many of the likeliest tokens to report with each token; None: report no probabilities.
        ignore_end: go on after the model's end token.

    Raises:
        RequestError: a value that cannot be.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "min_p": (0.0 <= self.min_p <= 1.0, "0 to 1"),
            "repetition_penalty": (0.0 < self.repetition_penalty < float("inf"), "above 0"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
            "stop": (all(self.stop), "texts that are not empty"),
            "seed": (self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "a 64-bit integer"),
        }
        for name, (fits, range_) in ranges.items():
            if not fits:
                raise RequestError(f"{name} is {getattr(self, name)!r}; choose {range_}.")


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability under the model, before any filter; None if not asked.
        top: the likeliest tokens and theirs, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: how.
        prompt: the tokens that were given; the repetition penalty counts them.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self._generator: torch.Generator | None = None
        if params.temperature >= _GREEDY_BELOW:
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)
        self._seen = sorted(set(prompt)) if params.repetition_penalty != 1.0 else []

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, from float32 logits [vocabulary]."""
        token = self._token(logits)
        if self.params.repetition_penalty != 1.0 and token not in self._seen:
            self._seen.append(token)
        if self.params.logprobs is None:
            return Choice(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        values, indices = logprobs.topk(min(self.params.logprobs, len(logits)))
        return Choice(token, float(logprobs[token]), tuple(zip(indices.tolist(), values.tolist(), strict=True)))

    def _token(self, logits: torch.Tensor) -> int:
        params = self.params
        if self._seen:
            seen = torch.tensor(self._seen)
            penalized = logits[seen]
            penalty = params.repetition_penalty
            penalized = torch.where(penalized > 0, penalized / penalty, penalized * penalty)
            logits = logits.index_copy(0, seen, penalized.clamp(-_LARGEST, _LARGEST))
        if self._generator is None:
            return int(logits.argmax())
        logits = logits / params.temperature
        values, indices = logits.topk(min(params.top_k or len(logits), len(logits)))
        probabilities = torch.softmax(values, dim=-1)  # descending
        if params.top_p < 1.0:
            before = probabilities.cumsum(0) - probabilities
            probabilities = torch.where(before < params.top_p, probabilities, 0.0)
        if params.min_p > 0.0:
            probabilities = torch.where(probabilities >= params.min_p * probabilities[0], probabilities, 0.0)
        return int(indices[torch.multinomial(probabilities, 1, generator=self._generator)])
