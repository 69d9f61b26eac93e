"""Reports: figures that belong together, and distances against what torch says of the same logits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.device import this_machine
from halfbyte.errors import RequestError
from halfbyte.infer import Completion, Engine, SamplingParams
from halfbyte.infer.costs import ProductCosts
from halfbyte.infer.report import Run, _steps_with_drafts, advise, distance, measure, render, resident
from halfbyte.infer.sampling import Choice
from halfbyte.kernels.decoder import PARTS
from halfbyte.models import HalfbyteConfig, load_model

FLOAT32 = HalfbyteConfig(block_size=32, compute_dtype=torch.float32)
GREEDY = SamplingParams(max_tokens=12, ignore_end=True)


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with Engine(tiny_llama, quantization=FLOAT32, slots=2) as engine:
        yield engine


def test_a_run_counts_what_was_written_and_shares_are_a_whole(engine):
    wanted = engine.generate(["abc", "de", "f"], GREEDY)
    answers, run = measure(engine, ["abc", "de", "f"], GREEDY, before=resident())
    assert [answer.text for answer in answers] == [answer.text for answer in wanted]
    assert run.written_tokens == 36
    assert run.prompt_tokens == sum(answer.prompt_tokens for answer in answers)
    assert set(run.shares) == {"prompt", "step", "sampling", "rest"}
    assert sum(run.shares.values()) == pytest.approx(1.0)
    assert run.shares["step"] > 0
    assert set(run.parts) == {*PARTS, "python"}
    assert all(run.parts[part] > 0 for part in PARTS)
    assert sum(run.parts.values()) == pytest.approx(run.shares["prompt"] + run.shares["step"])
    assert run.costs is not None
    assert sum(run.costs.shares.values()) == pytest.approx(1.0)
    assert min(run.costs.shares.values()) >= 0
    assert run.cores > 0
    assert run.tokens_a_second == 36 / run.seconds
    assert max(answer.seconds_to_first for answer in answers) <= run.seconds
    with pytest.raises(RequestError, match="at least one prompt"):
        measure(engine, [], GREEDY)


def test_steps_with_drafts_are_those_that_the_engine_takes(tiny_llama):
    params = SamplingParams(max_tokens=50, ignore_end=True, repetition_penalty=0.7)  # less than 1: it repeats itself
    with Engine(tiny_llama, quantization=FLOAT32, slots=1, drafts=8) as engine:
        (answer,) = engine.generate(["abcabcabcab"], params)
        prompt, taken = engine.token_ids("abcabcabcab"), engine.snapshot().steps
    assert taken == _steps_with_drafts(prompt, [choice.token for choice in answer.choices]) < 50
    assert _steps_with_drafts([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3, 4, 9]) == 2  # 4 5 1 2 3 4, then 9
    assert _steps_with_drafts([1, 2], [3, 4, 5]) == 3


def made_run(**changes):
    parts = {"norms": 0.01, "products": 0.5, "attention": 0.05, "head": 0.05, "python": 0.01}
    shares = {"prompt": 0.1, "step": 0.82, "sampling": 0.04, "rest": 0.04}
    costs = ProductCosts(7, 10**9, 1.0, 0.97, 0.2)
    cores = this_machine().cores
    run = Run("a decoder", 1.0, 0.1, 10, 10, shares, parts, float(cores), cores, costs, None, None)
    return replace(run, **changes)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"threads": this_machine().cores - 1}, [f"set OMP_NUM_THREADS={this_machine().cores}"]),
        ({"cores": this_machine().cores + 1.0}, ["OMP_WAIT_POLICY=PASSIVE"]),
        ({"cores": 0.1}, ["0.1 cores were busy"]),
        ({"parts": made_run().parts | {"head": 0.3}}, ["the output layer is dense and took 30%"]),
        ({"parts": made_run().parts | {"attention": 0.3}}, ["attention took 30%: cache_dtype int8"]),
        ({"costs": ProductCosts(7, 10**9, 1.0, 1.0, 0.8)}, [r"wait for memory \(1.2 GB/s\)"]),
        ({"costs": ProductCosts(7, 10**9, 1.0, 0.8, 0.2)}, ["decoding scales is 20% of the products"]),
        ({"parts": made_run().parts | {"python": 0.3}}, ["Python, sampling and text took 38%"]),
    ],
)
def test_advice_follows_from_what_was_measured(engine, changes, sentences):
    found = list(advise(engine, made_run(**changes), [], GREEDY))
    assert len(found) == len(sentences)
    for sentence, wanted in zip(found, sentences, strict=True):
        assert re.search(wanted, sentence)


def test_answers_that_repeat_call_for_drafts(engine):
    choices = tuple(Choice(token) for token in [4, 5, 6, 7] * 5)
    answer = Completion("", choices, "length", 8, 0, 0.0, 0.0)
    (sentence,) = advise(engine, made_run(), [([4, 5, 6, 7, 4, 5, 6, 7], answer)], GREEDY)
    assert sentence == "these 20 tokens repeat what came before: drafts=8 would take 4 steps for them."


def test_products_of_a_model_without_packed_weights_have_no_costs(tiny_llama):
    with Engine(load_model(tiny_llama, dtype=torch.float32), quantization=None) as engine:
        assert engine.product_costs() is None
        answers, run = measure(engine, ["abc"], GREEDY)
    assert answers[0].finish
    assert run.costs is None
    assert "one row" not in render({"dense": run})


def test_logits_are_those_of_transformers(engine, tiny_llama):
    """A bound of float32 sums in another order; and a slot that was used for it is no prefix of anything."""
    ids = engine.token_ids("abcdefgh" * 4)
    with torch.no_grad():
        wanted = load_model(tiny_llama, quantization=FLOAT32).eval()(torch.tensor([ids])).logits[0]
    (before,) = engine.generate(["abcdefgh"], GREEDY)
    torch.testing.assert_close(engine.logits(ids), wanted, rtol=1e-4, atol=1e-4)
    (after,) = engine.generate(["abcdefgh"], GREEDY)
    assert after.text == before.text
    with pytest.raises(RequestError, match="0 tokens"):
        engine.logits([])
    with pytest.raises(RequestError, match="no adapter"):
        engine.logits(ids, adapter="none")


def test_distance_is_nothing_to_itself_and_torchs_kl_to_others():
    rows = [torch.randn(3, 7), torch.randn(5, 7)]
    same = distance(rows, [part + 2.5 for part in rows])  # a constant changes no probability
    assert (same.positions, same.same) == (8, 1.0)
    assert same.cosine == pytest.approx(1.0, abs=1e-6)
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    others = [torch.randn(3, 7), torch.randn(5, 7)]
    found = distance(rows, others)
    ours, theirs = (torch.cat(part).double().log_softmax(-1) for part in (rows, others))
    wanted = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(wanted))
    assert found.same == float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    with pytest.raises(RequestError, match="same vocabulary"):
        distance(rows, [torch.randn(3, 8), torch.randn(5, 8)])


def test_the_command_reports_beside_the_answers(tiny_llama):
    ask = ["generate", str(tiny_llama), "-p", "abc", "--max-new-tokens", "8"]
    plain = CliRunner().invoke(app, ask)
    told = CliRunner().invoke(app, [*ask, "--report", "--report-against", str(tiny_llama)])
    assert told.exit_code == 0, told.output
    assert told.stdout == plain.stdout
    for word in (
        "time to first token",
        "tokens a second",
        "memory",
        "prompt",
        "step",
        "sampling",
        "rest",
        "16 bits",
        *PARTS,
    ):
        assert word in told.stderr
    assert "cosine 0.99" in told.stderr or "cosine 1.0" in told.stderr  # the same weights, rounded to bfloat16
    assert "16 bits" not in CliRunner().invoke(app, [*ask, "--report"]).stderr


def test_a_table_without_memory_says_so(engine):
    _, run = measure(engine, ["abc"], GREEDY)
    assert "unknown" in render({"this model": run})
