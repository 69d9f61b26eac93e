"""Prompt lookup: a sequence's own past as a guess at its future.

Answers quote: names, code, whole sentences of the prompt. What followed the last occurrence of the latest tokens is a
guess that costs a dictionary lookup, and a step verifies several tokens at little more than the price of one.

Source: Prompt Lookup Decoding, A. Saxena 2023; verified as in speculative decoding, arXiv 2211.17192, greedy case.
"""

from __future__ import annotations

from collections.abc import Iterable

_NGRAM = 3  # latest tokens that a draft has to follow


class PromptLookup:
    """The tokens of one sequence, and where each run of three of them was last followed by something.

    Args:
        tokens: of the prompt.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    @property
    def length(self) -> int:
        """Tokens there are."""
        return len(self._tokens)

    def add(self, token: int) -> None:
        """One token more."""
        if len(self._tokens) >= _NGRAM:
            self._after[tuple(self._tokens[-_NGRAM:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where the latest tokens are new."""
        begin = self._after.get(tuple(self._tokens[-_NGRAM:]))
        return [] if begin is None or most <= 0 else self._tokens[begin : begin + most]
