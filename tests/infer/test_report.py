"""Reports: figures that belong together, and distances against what torch says of the same logits."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.errors import RequestError
from halfbyte.infer import Engine, SamplingParams
from halfbyte.infer.report import distance, measure, render, resident
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
    assert run.tokens_a_second == 36 / run.seconds
    assert max(answer.seconds_to_first for answer in answers) <= run.seconds
    with pytest.raises(RequestError, match="at least one prompt"):
        measure(engine, [], GREEDY)


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
    for word in ("time to first token", "tokens a second", "memory", "prompt", "step", "sampling", "rest", "16 bits"):
        assert word in told.stderr
    assert "cosine 0.99" in told.stderr or "cosine 1.0" in told.stderr  # the same weights, rounded to bfloat16
    assert "16 bits" not in CliRunner().invoke(app, [*ask, "--report"]).stderr


def test_a_table_without_memory_says_so(engine):
    _, run = measure(engine, ["abc"], GREEDY)
    assert "unknown" in render({"this model": run})
