"""What a run of the engine cost, and how far its logits are from those of the model before quantization.

Everything is measured in the run that is reported. Where the time goes is what the engine's thread counted; the rest is
tokenizing, scheduling, and handing over what was written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from halfbyte.errors import RequestError

if TYPE_CHECKING:
    from halfbyte.infer.engine import Engine, Prompt
    from halfbyte.infer.requests import Completion
    from halfbyte.infer.sampling import SamplingParams

_MIB = 2**20


@dataclass(frozen=True)
class Run:
    """Figures of one run.

    Attributes:
        decoder: what ran the model.
        seconds: from the first request to the last token.
        seconds_to_first: median over the answers, waiting for other answers included.
        prompt_tokens: of all prompts.
        written_tokens: of all answers.
        shares: of `seconds`: "prompt", "step", "sampling" and "rest"; their sum is 1.
        resident: bytes that the process held after the run more than at `before`; None: the system does not say.
    """

    decoder: str
    seconds: float
    seconds_to_first: float
    prompt_tokens: int
    written_tokens: int
    shares: Mapping[str, float]
    resident: int | None

    @property
    def tokens_a_second(self) -> float:
        """Tokens written in a second of the whole run, reading prompts included."""
        return self.written_tokens / self.seconds


@dataclass(frozen=True)
class Distance:
    """How far logits are from a reference's, as means over positions.

    Attributes:
        positions: so many were compared.
        cosine: of the angle between the two rows of logits, each less its mean, which no probability depends on.
        kl: KL(reference || model) in nats.
        same: share of positions at which both find the same token likeliest.
    """

    positions: int
    cosine: float
    kl: float
    same: float


def resident() -> int | None:
    """Bytes of memory that the process holds; None: the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def measure(
    engine: Engine,
    prompts: Iterable[Prompt],
    params: SamplingParams,
    adapter: str | Mapping[str, float] | None = None,
    *,
    before: int | None = None,
) -> tuple[list[Completion], Run]:
    """Answer prompts together, as `Engine.generate` does, and say what it cost. Nothing else may run on the engine.

    Args:
        engine: answers.
        prompts: see `Engine.generate`.
        params: see `Engine.generate`.
        adapter: see `Engine.generate`.
        before: `resident()` before the model was loaded.

    Raises:
        RequestError: no prompts; and see `Engine.submit`.
    """
    first = engine.snapshot()
    began = time.monotonic()
    answers = engine.generate(prompts, params, adapter=adapter)
    seconds = time.monotonic() - began
    last = engine.snapshot()
    if not answers:
        raise RequestError("there is nothing to measure: give at least one prompt.")
    shares = {part: (last.seconds[part] - first.seconds[part]) / seconds for part in last.seconds}
    shares["rest"] = max(1.0 - sum(shares.values()), 0.0)
    after = resident()
    run = Run(
        engine.decoder,
        seconds,
        median(answer.seconds_to_first for answer in answers),
        sum(answer.prompt_tokens for answer in answers),
        last.written_tokens - first.written_tokens,
        shares,
        after - before if after is not None and before is not None else None,
    )
    return answers, run


def distance(logits: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Distance:
    """Compare logits with a reference's.

    Args:
        logits: one tensor [positions, vocabulary] for each text.
        reference: as `logits`, of the same texts.

    Raises:
        RequestError: the shapes differ: models of different vocabularies have no common probabilities.
    """
    if [rows.shape for rows in logits] != [rows.shape for rows in reference]:
        raise RequestError("the two models do not have the same vocabulary; compare a model with its own original.")
    ours, theirs = (torch.cat(list(rows)).double() for rows in (logits, reference))
    our_shape, their_shape = (rows - rows.mean(-1, keepdim=True) for rows in (ours, theirs))
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return Distance(
        len(ours),
        float(torch.cosine_similarity(our_shape, their_shape, dim=-1).mean()),
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    )


def render(runs: Mapping[str, Run], apart: Distance | None = None) -> str:
    """A table, one column for each run, and the distance below it."""
    measured = list(runs.values())
    rows: list[tuple[str, ...]] = [
        ("", *runs),
        ("time to first token", *(f"{1000 * run.seconds_to_first:.1f} ms" for run in measured)),
        ("tokens a second", *(f"{run.tokens_a_second:.1f}" for run in measured)),
        ("tokens read, written", *(f"{run.prompt_tokens}, {run.written_tokens}" for run in measured)),
        ("memory", *("unknown" if run.resident is None else f"{run.resident / _MIB:.1f} MiB" for run in measured)),
        *((f"  {part}", *(f"{100 * run.shares[part]:.1f} %" for run in measured)) for part in measured[0].shares),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines += [f"{name}: {run.decoder}" for name, run in runs.items()]
    if apart is not None:
        lines.append(
            f"logits at {apart.positions} positions: cosine {apart.cosine:.6f}, KL {apart.kl:.3g} nats, "
            f"same likeliest token {100 * apart.same:.1f} %"
        )
    return "\n".join(lines)
