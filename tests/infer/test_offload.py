"""What stays in memory and what is read again: the choice for any sizes, and answers that do not depend on it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.cli.answering import memory_size
from halfbyte.errors import RequestError
from halfbyte.infer import Engine, SamplingParams, offload
from halfbyte.infer.offload import Offload, Plan, make_plan
from halfbyte.infer.report import measure
from halfbyte.kernels import cpu
from halfbyte.models import HalfbyteConfig, quantize_to_archive
from halfbyte.models.mapping import Part

GREEDY = SamplingParams(max_tokens=8, ignore_end=True)
LONG = "abcdefgh" * 10  # more tokens than a step takes with the others': it goes through the torch decoder
SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def archive(request, tmp_path_factory, tiny_tokenizer, make_model):
    """Seven layers of 100 KiB or so: pages enough for each to have its own."""
    folder = tmp_path_factory.mktemp("offload") / "llama"
    options = {"num_hidden_layers": 7, "hidden_size": 192, "intermediate_size": 448, "num_attention_heads": 6}
    make_model("llama", len(tiny_tokenizer), folder, **options, initializer_range=0.1)
    tiny_tokenizer.save_pretrained(folder)
    path = folder.parent / "model.nf4dq"
    quantize_to_archive(folder, path, HalfbyteConfig(compute_dtype=request.param))
    return path


def at_once(sizes, read):
    """Bytes of the two units that are there together, at most."""
    return max(sizes[unit] + sizes[after] for unit, after in zip(read, (*read[1:], read[0]), strict=True))


@given(SIZES, st.integers(-100, 30_000))
def test_a_plan_fits_whenever_one_can(sizes, budget):
    plan = make_plan(sizes, budget)
    assert list(plan.read) == sorted({*plan.read})
    assert all(sizes[unit] for unit in plan.read)
    if sum(sizes) <= budget:
        assert plan == Plan((), False)
    elif plan.ahead:
        kept = sum(sizes) - sum(sizes[unit] for unit in plan.read)
        assert kept + at_once(sizes, plan.read) <= budget
    else:
        everything = tuple(unit for unit, size in enumerate(sizes) if size)
        assert plan.read == everything
        assert len(everything) <= 2 or at_once(sizes, everything) > budget


@given(st.integers(1, 100), st.integers(0, 300), st.integers(0, 30_000))
def test_equal_layers_are_kept_as_many_as_fit_and_read_evenly(layers, head, budget):
    plan = make_plan([100] * layers + [head], budget)
    if not plan.ahead or layers in plan.read:
        return
    assert layers - len(plan.read) == (budget - head) // 100 - 2
    gaps = {b - a for a, b in zip(plan.read, (*plan.read[1:], plan.read[0] + layers), strict=True)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("sizes", "budget", "plan"),
    [
        ([10, 10, 10, 10, 5], 45, Plan((), False)),
        ([10, 10, 10, 10, 5], 44, Plan((0, 2, 3), True)),
        ([10, 10, 10, 10, 5], 25, Plan((0, 1, 2, 3), True)),
        ([10, 10, 10, 10, 5], 20, Plan((0, 1, 2, 3, 4), True)),
        ([10, 10, 10, 10, 5], 9, Plan((0, 1, 2, 3, 4), False)),  # less than a layer
        ([10, 10, 10, 10, 5], 0, Plan((0, 1, 2, 3, 4), False)),
        ([10, 10, 10, 30], 41, Plan((0, 1, 2, 3), True)),  # a head that does not fit beside a layer
        ([0, 0, 0], 0, Plan((), False)),  # nothing is mapped
        ([10, 10, 0], 15, Plan((0, 1), False)),  # two layers would both be there in any case
        ([7], 3, Plan((0,), False)),
    ],
)
def test_plans_of_odd_models(sizes, budget, plan):
    assert make_plan(sizes, budget) == plan


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("native", [True, False])
def test_answers_do_not_depend_on_what_stays(archive, share, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu, "native_library", lambda: cpu.Missing("it is not wanted", "none"))
    prompts = ["abc", "hello world", LONG, "x"]
    with Engine(archive, slots=3, max_memory=1 << 40) as whole:
        wanted = whole.generate(prompts, GREEDY)
        logits = whole.logits("hello")
        size = whole.offload.nbytes
        assert whole.offload.offloaded == 0
        assert "MiB" not in whole.decoder
    with Engine(archive, slots=3, max_memory=int(share * size), drafts=4) as engine:
        assert 0 < engine.offload.offloaded <= size - (share - 0.5) * size
        assert "fit into the memory" in engine.decoder
        found = engine.generate(prompts, GREEDY)
        assert [[c.token for c in answer.choices] for answer in found] == [
            [c.token for c in answer.choices] for answer in wanted
        ]
        assert torch.equal(engine.logits("hello"), logits)
        assert (engine.offload.waited > 0) == engine.offload._plan.ahead


def test_a_report_says_what_the_disk_takes(archive):
    with Engine(archive, slots=1) as engine:
        _, run = measure(engine, ["abc"], GREEDY)
        assert "disk" not in run.parts
    with Engine(archive, slots=1, max_memory=engine.offload.nbytes // 2) as engine:
        _, run = measure(engine, ["abc"], GREEDY)
    assert run.parts["disk"] > 0
    assert sum(run.parts.values()) == pytest.approx(run.shares["prompt"] + run.shares["step"])
    assert any("do not fit into the memory" in sentence and "MB/s" in sentence for sentence in run.advice)


class Inline:
    """An executor that runs what it gets at once."""

    def __init__(self, *_):
        pass

    def submit(self, action, *arguments):
        future = Future()
        future.set_result(action(*arguments))
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.fixture
def moves(monkeypatch):
    """What an offload fetches and releases, as numbers of units, in order."""
    done = []
    monkeypatch.setattr(offload, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(offload, "expect_whole", lambda parts: None)
    monkeypatch.setattr(offload, "fetch_parts", lambda parts: done.append(("fetch", parts[0].begin // 100)))
    monkeypatch.setattr(offload, "release", lambda parts: done.append(("release", parts[0].begin // 100)))
    return done


def units(count):
    """Units of 100 bytes each, the last of which is the head."""
    return [[Part(100 * unit, 100 * unit + 100)] for unit in range(count)]


def steps(of, count, head=True):
    """Enter what decoders enter."""
    for _ in range(count):
        at = 0
        while at < len(of._units) - (not head):
            following = of.enter(at)
            assert following > at
            at = following


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("budget", [650, 500, 300, 200])
def test_a_unit_is_there_when_it_is_entered_and_little_else(moves, head, budget):
    of = Offload(units(7), budget)
    assert of.offloaded > 0
    there = set()
    for _ in range(40):
        at = 0
        while at < 7 - (not head):
            following = of.enter(at)
            for kind, unit in moves:
                (there.add if kind == "fetch" else there.discard)(unit)
            assert set(range(at, min(following, 7 - (not head)))) <= there
            assert 100 * len(there) <= budget
            moves.clear()
            at = following


def test_each_step_reads_what_does_not_stay_and_nothing_else(moves):
    of = Offload(units(7), 550)
    read = of._plan.read
    steps(of, 1)
    moves.clear()
    steps(of, 5)
    fetched = [unit for kind, unit in moves if kind == "fetch"]
    assert sorted(fetched) == sorted([*read] * 5)
    assert of.read >= 5 * of.offloaded


def test_without_room_for_two_units_nothing_is_read_ahead(moves):
    of = Offload(units(7), 150)
    moves.clear()
    steps(of, 2)
    assert moves == [("release", unit % 7) for unit in range(13)]


def test_a_model_that_fits_is_left_alone(moves):
    of = Offload(units(7), 700)
    steps(of, 3)
    assert moves == []
    assert of.enter(0) == 7


def test_the_choice_follows_the_memory(moves, monkeypatch):
    memory = [450]
    monkeypatch.setattr(offload, "memory_for_weights", lambda: memory[0])
    monkeypatch.setattr(offload, "_LOOK", 0.0)
    of = Offload(units(11))
    assert of.offloaded == 900
    for available, offloaded in ((650, 700), (750, 700), (850, 500), (650, 700), (1100, 0), (450, 900), (None, 0)):
        memory[0] = available  # one layer more is not worth a change; one less is
        steps(of, 2)
        assert of.offloaded == offloaded
    moves.clear()
    steps(of, 2)
    assert moves == []


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 << 30), ("0MB", 0), ("1.5 gb", 1_500_000_000), (" 300kb", 300_000), ("2TiB", 2 << 40)]
)
def test_sizes_on_the_command_line(text, size):
    assert memory_size(text) == size


def test_a_wrong_size_is_refused(archive):
    with pytest.raises(RequestError, match="max_memory is -1"):
        Engine(archive, max_memory=-1)


SHRINK = """
import os, sys
import halfbyte as hb
from halfbyte.errors import CheckpointError
from halfbyte.infer import SamplingParams

path = sys.argv[1]
params = SamplingParams(4, ignore_end=True)
with hb.Engine(path, max_memory=os.path.getsize(path) // 3) as engine:
    engine.generate(["abc"], params)
    assert engine.offload.offloaded
    os.truncate(path, os.path.getsize(path) // 2)
    try:
        engine.generate(["abc"], params)
        print("nothing happened")
    except CheckpointError as error:
        print(error)
"""


def test_a_file_that_shrinks_is_still_an_error(archive, tmp_path):
    """It is mapped by a thread of transformers' loader, and missed by one of the engine."""
    if isinstance(cpu.native_library(), cpu.Missing):
        pytest.skip("there is no guard without the native library")
    path = tmp_path / "model.nf4dq"
    path.write_bytes(archive.read_bytes())
    done = subprocess.run([sys.executable, "-c", SHRINK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it became shorter while it was mapped" in done.stdout
