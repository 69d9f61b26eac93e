"""The cache stays below its size: the oldest goes, what a process uses stays, what a kill left goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from halfbyte import env
from halfbyte.data import eviction
from halfbyte.data.eviction import FORGOTTEN, evict, hold
from halfbyte.errors import RequestError

MARKER = "report.json"


@pytest.fixture
def make(tmp_path):
    """Entries of 100 bytes and a marker of 2, used so many seconds ago."""

    def entry(name, age):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows").write_bytes(bytes(100))
        (folder / MARKER).write_text("{}")
        os.utime(folder / MARKER, (time.time() - age,) * 2)
        return folder / MARKER

    return entry


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_used_longest_ago_goes_first(make, tmp_path):
    for name, age in (("old", 300), ("older", 400), ("new", 100), ("newer", 50)):
        make(name, age)
    evict(tmp_path, MARKER, 4 * 102)
    assert names(tmp_path) == ["new", "newer", "old", "older"]
    evict(tmp_path, MARKER, 2 * 102 + 1)
    assert names(tmp_path) == ["new", "newer"]


def test_using_an_entry_makes_it_the_newest(make, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "_held", {})
    make("a", 200), make("b", 100)
    assert hold(tmp_path / "a" / MARKER)
    eviction._held.clear()  # as if this process had ended
    evict(tmp_path, MARKER, 102)
    assert names(tmp_path) == ["a"]


def test_what_this_process_uses_stays(make, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "_held", {})
    marker = make("a", 100)
    assert hold(marker)
    evict(tmp_path, MARKER, 0)
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(eviction.fcntl is None, reason="no advisory locks here")
def test_what_another_process_uses_stays_until_it_ends(make, tmp_path):
    marker = make("a", 100)
    code = (
        "import pathlib, sys; from halfbyte.data.eviction import hold;"
        "print(hold(pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(marker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    evict(tmp_path, MARKER, 0)
    assert names(tmp_path) == ["a"]
    other.kill()
    other.communicate()
    evict(tmp_path, MARKER, 0)
    assert names(tmp_path) == []


def test_an_entry_that_is_gone_is_not_held(make, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "_held", {})
    assert not hold(tmp_path / "never" / MARKER)
    marker = make("a", 0)
    assert hold(marker)
    marker.unlink()  # somebody emptied the cache by hand
    assert not hold(marker)


def test_what_killed_processes_left_goes_in_the_end(tmp_path):
    for name, age in ((".building-x", FORGOTTEN + 60), (".doomed-y", FORGOTTEN + 60), (".building-now", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    evict(tmp_path, MARKER, 10**9)
    assert names(tmp_path) == [".building-now"]


def test_the_limit_is_a_number_of_gigabytes(monkeypatch):
    monkeypatch.delenv("HALFBYTE_CACHE_GB", raising=False)
    assert env.cache_limit() == 20_000_000_000
    monkeypatch.setenv("HALFBYTE_CACHE_GB", "0.5")
    assert env.cache_limit() == 500_000_000
    for wrong in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("HALFBYTE_CACHE_GB", wrong)
        with pytest.raises(RequestError, match=f"HALFBYTE_CACHE_GB='{wrong}' is not a number of gigabytes"):
            env.cache_limit()
