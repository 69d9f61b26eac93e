"""The figure of the decoding benchmark, from figures that nobody measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATES = {"halfbyte": 90.0, "llama.cpp": 75.0, "bitsandbytes": 45.0, "dense": 27.0}


@pytest.fixture
def results():
    """As the benchmark's last line has them, not in order, and without what some contenders did not do."""
    works = [*(f"decode {size}" for size in (32, 1, 4)), "adapter 1", "prefill 2000", "prefill 16"]
    rates = {work: {name: rate * int(work.split()[1]) ** 0.5 for name, rate in RATES.items()} for work in works}
    del rates["decode 32"]["bitsandbytes"], rates["prefill 2000"]["dense"]
    return {
        "benchmark": "decode",
        "date": "2026-11-22",
        "machine": "2 cores of a processor",
        "tokens_per_second": rates,
        "limit": dict.fromkeys(works, 200.0),
        "read_bytes_per_second": 3e10,
        "multiply_flops": 2e12,
    }


def test_curves_are_what_was_measured_by_size(results, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _curves import curves

    lines = curves(results, "decode")
    assert lines["halfbyte"] == [(1, 90.0), (4, 180.0), (32, 90.0 * 32**0.5)]
    assert lines["bitsandbytes"] == [(1, 45.0), (4, 90.0)]
    assert lines["limit"] == [(1, 200.0), (4, 200.0), (32, 200.0)]
    assert set(lines) == {*RATES, "limit"}
    assert [size for size, _ in curves(results, "prefill")["llama.cpp"]] == [16, 2000]
    assert curves(results, "prefill")["dense"] == [(16, 27.0 * 4)]


def test_a_figure_is_drawn_from_what_a_run_printed(results, tmp_path):
    pytest.importorskip("matplotlib")
    printed, figure = tmp_path / "decode.txt", tmp_path / "decode.png"
    printed.write_text("memory is read ...\n| a table |\n" + json.dumps(results) + "\n")
    command = [sys.executable, str(BENCHMARKS / "decode.py"), "--results", str(printed)]
    done = subprocess.run([*command, "--figure", str(figure)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode == 2
    assert "--results and --figure belong together" in alone.stderr
