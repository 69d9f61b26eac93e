"""What a run of the engine cost, and how far its logits are from those of the model before quantization.

Everything is measured in the run that is reported. Where the time goes is what the engine's thread and the decoder's
steps counted; the rest is tokenizing, scheduling, and handing over what was written. What products are made of is
measured on the same weights right after the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from halfbyte.device import this_machine
from halfbyte.errors import RequestError
from halfbyte.infer.costs import ProductCosts
from halfbyte.infer.lookup import PromptLookup

if TYPE_CHECKING:
    from halfbyte.infer.engine import Engine, Prompt
    from halfbyte.infer.requests import Completion
    from halfbyte.infer.sampling import SamplingParams

_MIB = 2**20
_NOTABLE = 0.1  # share of the time from which something is worth a sentence
_CROWDED = 0.7  # of the cores that could have been busy
_SPINNING = 0.5  # cores busy beyond the threads that compute
_DRAFTS = 8
_NF4_BITS = 4.127  # with double quantization, scales included


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
        parts: of `seconds`, what prompts and steps are made of: the decoder's parts, "disk" where weights do not fit
            into the memory, and "python" around them.
        cores: the process kept busy, on average.
        threads: torch computes with.
        costs: of the products with packed weights; None: there are none.
        advice: what to change, by what was measured; sentences.
        resident: bytes that the process held after the run more than at `before`; None: the system does not say.
        on_card: bytes that tensors took at most on the card; None: the model is not on one.
    """

    decoder: str
    seconds: float
    seconds_to_first: float
    prompt_tokens: int
    written_tokens: int
    shares: Mapping[str, float]
    parts: Mapping[str, float]
    cores: float
    threads: int
    costs: ProductCosts | None
    resident: int | None
    on_card: int | None
    advice: tuple[str, ...] = ()

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
    asked = list(prompts)
    first = engine.snapshot()
    began, worked = time.monotonic(), time.process_time()
    answers = engine.generate(asked, params, adapter=adapter)
    seconds, worked = time.monotonic() - began, time.process_time() - worked
    last = engine.snapshot()
    if not answers:
        raise RequestError("there is nothing to measure: give at least one prompt.")
    shares = {part: (last.seconds[part] - first.seconds[part]) / seconds for part in last.seconds}
    shares["rest"] = max(1.0 - sum(shares.values()), 0.0)
    parts = {part: (last.parts[part] - first.parts.get(part, 0.0)) / seconds for part in last.parts}
    parts["python"] = max(shares["prompt"] + shares["step"] - sum(parts.values()), 0.0)
    after = resident()
    run = Run(
        engine.decoder,
        seconds,
        median(answer.seconds_to_first for answer in answers),
        sum(answer.prompt_tokens for answer in answers),
        last.written_tokens - first.written_tokens,
        shares,
        parts,
        worked / seconds,
        torch.get_num_threads(),
        engine.product_costs(),
        after - before if after is not None and before is not None else None,
        None if engine.device.type == "cpu" else torch.cuda.max_memory_allocated(engine.device),
    )
    texts = [([*engine.token_ids(prompt)], answer) for prompt, answer in zip(asked, answers, strict=True)]
    return answers, replace(run, advice=tuple(advise(engine, run, texts, params)))


def advise(
    engine: Engine, run: Run, texts: Sequence[tuple[list[int], Completion]], params: SamplingParams
) -> Iterator[str]:
    """What to change, by what was measured: one sentence for each thing that took a notable share of the time.

    Args:
        engine: that made the run.
        run: its figures.
        texts: the prompts' tokens with their answers.
        params: of the answers.
    """
    computing = run.shares["prompt"] + run.shares["step"]
    available = this_machine().cores
    wanted = run.threads * computing + 1 - computing
    if engine.device.type != "cpu":
        pass  # its cores only hand over work
    elif run.threads < available:
        yield f"torch computes with {run.threads} of {available} cores: set OMP_NUM_THREADS={available}."
    elif run.cores > run.threads + _SPINNING:
        yield f"{run.cores:.1f} cores were busy for {run.threads} threads: set OMP_WAIT_POLICY=PASSIVE."
    elif run.cores < _CROWDED * wanted:
        yield f"{run.cores:.1f} cores were busy where {wanted:.1f} could have been: other programs took the rest."
    offload = engine.offload
    if offload is not None and offload.offloaded:
        yield (
            f"the weights do not fit into the memory: each step reads {offload.offloaded / _MIB:.0f} of "
            f"{offload.nbytes / _MIB:.0f} MiB from the disk, at {offload.rate / 1e6:.0f} MB/s, and waiting for it took "
            f"{run.parts.get('disk', 0.0):.0%}: several answers at once, or prompt lookup (drafts), share one reading; "
            "so much more memory would end it."
        )
    network = engine.network
    if network is not None and isinstance(network.head.weight, torch.Tensor) and run.parts.get("head", 0.0) > _NOTABLE:
        now, then = network.head.weight.nbytes, network.head.n * network.head.k * _NF4_BITS // 8
        yield (
            f"the output layer is dense and took {run.parts['head']:.0%}: quantized (quantize_head) it would be "
            f"{then / 1e6:.1f} MB a token instead of {now / 1e6:.1f}; that changes the numbers."
        )
    if run.parts.get("attention", 0.0) > _NOTABLE and engine.cache_dtype in (torch.float32, torch.bfloat16):
        yield f"attention took {run.parts['attention']:.0%}: cache_dtype int8 would let it read half as much or less."
    if run.costs is not None and run.parts.get("products", 0.0) > _NOTABLE:
        shares = run.costs.shares
        if shares["reading"] > 0.5:
            yield (
                f"products wait for memory ({run.costs.nbytes / run.costs.reading / 1e9:.1f} GB/s): more tokens a step "
                "cost little, so ask for several answers at once, or let prompt lookup draft."
            )
        if shares["scale decoding"] > _NOTABLE:
            yield f"decoding scales is {shares['scale decoding']:.0%} of the products: plain scales need none of it."
    if not params.temperature and not engine.drafts:
        written = sum(len(answer.choices) for _, answer in texts)
        steps = sum(_steps_with_drafts(prompt, [choice.token for choice in answer.choices]) for prompt, answer in texts)
        if steps < (1 - _NOTABLE) * written:
            yield f"these {written} tokens repeat what came before: drafts={_DRAFTS} would take {steps} steps for them."
    if 1 - computing + run.parts["python"] > 2 * _NOTABLE:
        yield (
            f"Python, sampling and text took {1 - computing + run.parts['python']:.0%}: more answers at once share "
            "what a step costs besides its rows."
        )


def _steps_with_drafts(prompt: list[int], written: list[int]) -> int:
    """In how many steps prompt lookup would have written this greedy answer."""
    lookup, at, steps = PromptLookup(prompt), 0, 0
    while at < len(written):
        draft = lookup.draft(_DRAFTS)
        count = 1
        while count <= len(draft) and written[at : at + count] == draft[:count]:
            count += 1
        for token in written[at : at + count]:
            lookup.add(token)
        at, steps = at + count, steps + 1
    return steps


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
    names = dict.fromkeys(chain(*(run.parts for run in measured)))
    rows: list[tuple[str, ...]] = [
        ("", *runs),
        ("time to first token", *(f"{1000 * run.seconds_to_first:.1f} ms" for run in measured)),
        ("tokens a second", *(f"{run.tokens_a_second:.1f}" for run in measured)),
        ("tokens read, written", *(f"{run.prompt_tokens}, {run.written_tokens}" for run in measured)),
        ("memory", *("unknown" if run.resident is None else _mebibytes(run.resident) for run in measured)),
        *([("of the card", *(_mebibytes(run.on_card or 0) for run in measured))] if measured[0].on_card else []),
        *((f"  {part}", *(_percent(run.shares[part]) for run in measured)) for part in measured[0].shares),
        ("prompts and steps, by part", *("" for _ in measured)),
        *((f"  {part}", *(_percent(run.parts.get(part)) for run in measured)) for part in names),
    ]
    if any(run.costs is not None for run in measured):
        shares = [run.costs.shares if run.costs is not None else {} for run in measured]
        rows.append(("a product of one row, by part", *("" for _ in measured)))
        rows += [
            (f"  {part}", *(_percent(share.get(part)) for share in shares)) for part in dict.fromkeys(chain(*shares))
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines += [f"{name}: {run.decoder}" for name, run in runs.items()]
    for name, run in runs.items():
        lines += [f"to change in {name}: {sentence}" for sentence in run.advice]
    if apart is not None:
        lines.append(
            f"logits at {apart.positions} positions: cosine {apart.cosine:.6f}, KL {apart.kl:.3g} nats, "
            f"same likeliest token {100 * apart.same:.1f} %"
        )
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
