"""What the fuzzer starts from and what it found interesting, again; and a short random walk from there.

The walk is no substitute for `make fuzz`: it has no eyes for coverage. It finds out whether the targets still run.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TARGETS = ("archive", "forged", "safetensors", "index")


@pytest.fixture(scope="module")
def readers():
    spec = importlib.util.spec_from_file_location("fuzz_targets", HERE / "readers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_kept_is_read_or_refused(readers, tmp_path, target):
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    call, generator = getattr(readers.Readers(tmp_path), target), random.Random(0)
    (tmp_path / "seeds").mkdir()
    for file in sorted((CORPUS / target).glob("*")):
        call(file.read_bytes())
    for data in readers.seeds(tmp_path / "seeds")[target]:
        call(data)
        for _ in range(30):
            walked = bytearray(data)
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(walked))
                walked[place : place + generator.randint(0, 2)] = generator.randbytes(generator.randint(0, 2))
            call(bytes(walked))


def test_a_forged_archive_is_read_as_it_was_written(readers, tmp_path):
    """Otherwise the target would refuse everything at its first line."""
    archive = readers.seeds(tmp_path)["archive"][0]
    assert readers.forge(readers.unforge(archive)) == archive
    (tmp_path / "a.nf4dq").write_bytes(archive)
    assert set(readers._read_archive(tmp_path / "a.nf4dq", verify=True)) == {"w", "n", "t"}
