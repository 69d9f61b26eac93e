"""Whether two models say the same: the divergence of their logits, and how often they choose the same token.

A merge is compared with the adapter on its base. The adapter's model answers some prompts greedily, and both models
then read prompt and answer:

    KL         sum over tokens of p (ln p - ln q), p the adapter's probabilities and q the merge's, in nats; the mean
               and the largest over all positions
    agreement  the share of the answers' tokens at which the merge, having read the same, would choose the same

A small KL means something only beside another: that of the base without its adapter, which is what a merge that lost
the whole adapter would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import RequestError

if TYPE_CHECKING:
    import torch

# What is asked where the caller has no prompts: plain openings that most language models can go on from.
PROMPTS = (
    "Once upon a time, there was a little girl who",
    "The capital of France is",
    "One day, a boy found a big box. He opened it and",
    "In the year 1990, the city",
    "To make a cake, you first need",
    "She looked at the sky and said",
    "The most important thing about water is",
    "Two friends walked to the park. They",
)


@dataclass(frozen=True)
class Reference:
    """What the adapter's model said.

    Attributes:
        rows: prompt and answer, token ids.
        starts: where each answer begins.
        logits: float32 [tokens - 1, vocabulary] for each row, on the CPU: what was said after each token but the last.
    """

    rows: list[list[int]]
    starts: list[int]
    logits: list[torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """How another model differs from the reference.

    Attributes:
        kl: mean over positions, nats.
        largest_kl: of one position.
        agreement: share of the answers' tokens, 0 to 1.
        positions: how many were compared.
    """

    kl: float
    largest_kl: float
    agreement: float
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "kl": self.kl,
            "largest_kl": self.largest_kl,
            "greedy_agreement": self.agreement,
            "positions": self.positions,
        }


def reference(model: Any, rows: Sequence[Sequence[int]], *, max_new_tokens: int = 32) -> Reference:
    """Let a model answer prompts greedily, and keep its logits.

    Args:
        model: a causal language model in eval mode.
        rows: prompts, token ids.
        max_new_tokens: tokens of an answer; no end token stops it, so that all are compared.

    Raises:
        RequestError: a prompt is empty or leaves no room in the model's context.
    """
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    done, logits = [], []
    for number, row in enumerate(rows, 1):
        if not row or (limit is not None and len(row) >= limit):
            raise RequestError(f"prompt {number} has {len(row)} tokens; the model's context holds {limit}")
        length = len(row) + max_new_tokens if limit is None else min(limit, len(row) + max_new_tokens)
        ids = list(row)
        with torch.inference_mode():
            state, unread = None, ids
            while len(ids) < length:
                out = model(torch.tensor([unread], device=model.device), past_key_values=state, use_cache=True)
                state = out.past_key_values
                unread = [int(out.logits[0, -1].argmax())]
                ids = [*ids, *unread]
            # Read again in one pass: the way that the other model reads, so that the same model differs by nothing.
            logits.append(_logits(model, ids))
        done.append(ids)
    return Reference(done, [len(row) for row in rows], logits)


def parity(wanted: Reference, model: Any) -> Parity:
    """Compare a model with the reference.

    Args:
        wanted: from `reference`.
        model: a causal language model in eval mode, with the same vocabulary.

    Raises:
        RequestError: another vocabulary.
    """
    import torch

    kls, same = [], []
    for ids, start, expected in zip(wanted.rows, wanted.starts, wanted.logits, strict=True):
        with torch.inference_mode():
            said = _logits(model, ids)
        if said.shape != expected.shape:
            raise RequestError(f"the vocabularies differ: {said.shape[-1]} and {expected.shape[-1]} tokens")
        p, q = expected.double().log_softmax(-1), said.double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(said[start - 1 :].argmax(-1) == expected[start - 1 :].argmax(-1))
    kl, agreed = torch.cat(kls).clamp(min=0), torch.cat(same)
    return Parity(float(kl.mean()), float(kl.max()), float(agreed.double().mean()), len(kl))


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    import torch

    out: torch.Tensor = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return out[0, :-1].float().cpu()
