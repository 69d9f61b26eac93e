"""Answers in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.infer.sampling import Choice

# An answer that was cancelled was so because its client left or time was up; nobody reads the word.
_FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", None: None}


class Shape:
    """How one endpoint's answers look, streamed or whole.

    Args:
        chat: whether it is the chat endpoint.
        identity: the answer's id.
        created: seconds since 1970.
        model: the name that the client used.
        tokenizer: transformers' tokenizer, for the texts of single tokens.
        logprobs: whether tokens are to be reported with their probabilities.
    """

    def __init__(self, chat: bool, identity: str, created: int, model: str, tokenizer: Any, logprobs: bool) -> None:
        self.chat, self.tokenizer, self.logprobs = chat, tokenizer, logprobs
        self._head = {"id": identity, "created": created, "model": model}
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[tuple[str, Sequence[Choice], str]], usage: dict[str, Any]) -> dict[str, Any]:
        """A complete answer from each one's text, tokens and reason to end."""
        choices = []
        for index, (text, tokens, finish) in enumerate(answers):
            entry: dict[str, Any] = {"index": index, "finish_reason": _FINISH[finish]}
            entry |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            entry["logprobs"] = self._probabilities(index, tokens)
            choices.append(entry)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def piece(self, index: int, text: str, tokens: Sequence[Choice], finish: str | None) -> dict[str, Any]:
        """A part of a streamed answer."""
        entry: dict[str, Any] = {"index": index, "finish_reason": _FINISH[finish]}
        entry |= {"delta": {"content": text} if text or finish is None else {}} if self.chat else {"text": text}
        entry["logprobs"] = self._probabilities(index, tokens)
        return self._piece([entry])

    def first(self, index: int) -> dict[str, Any]:
        """What a streamed chat answer begins with."""
        delta = {"role": "assistant", "content": ""}
        return self._piece([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What a stream ends with where usage was asked for."""
        return {**self._piece([]), "usage": usage}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _probabilities(self, index: int, tokens: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._token(token.token, token.logprob or 0.0),
                        "top_logprobs": [self._token(other, value) for other, value in token.top],
                    }
                    for token in tokens
                ]
            }
        texts = [self.tokenizer.decode([token.token]) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.tokenizer.decode([other]): value for other, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}


def usage(prompt: int, cached: int, written: int) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it; half of a surrogate pair that it quotes becomes a question mark."""
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
