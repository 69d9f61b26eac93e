"""Paged states: the same numbers as in memory, within the budget, and one sentence when there is no room."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import OutputError, RequestError
from halfbyte.optim import paging

linux = pytest.mark.skipif(sys.platform != "linux", reason="paged='file' needs Linux")


def train(steps=4, shapes=((300, 257), (5000,), (64, 64), (100,), (70000,)), dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    optimizer = hb.optim.AdamW(params, lr=1e-2, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return params, optimizer


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float32", "8bit", "4bit"])
def test_paged_in_a_file_equals_unpaged_bit_for_bit(kind, dtype):
    # The budget is below most states: they are stepped in ranges, stochastic rounding included.
    budget = 1 << 17 if kind == "4bit" else 1 << 16
    expected, _ = train(state=kind, dtype=dtype, max_grad_norm=1.0)
    found, optimizer = train(state=kind, dtype=dtype, max_grad_norm=1.0, paged="file", page_budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(optimizer._pieces) > (1 if kind == "4bit" else 2)


@linux
def test_the_file_has_no_name_and_its_space_comes_back(tmp_path):
    free = os.statvfs(tmp_path).f_bavail
    _, optimizer = train(state="float32", paged="file", page_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    assert os.statvfs(tmp_path).f_bavail < free
    with pytest.raises(RequestError, match=r"4-bit state of one matrix takes .* larger budget"):
        train(state="4bit", paged="file", page_budget=1 << 16, shapes=((1000, 1000),))
    del optimizer


@linux
def test_a_full_disk_is_one_sentence_and_nothing_has_changed(monkeypatch):
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    optimizer = hb.optim.AdamW([p], paged="file")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paging.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"64 MiB of optimizer state cannot be paged to .*: the disk is full"):
        optimizer.step()
    assert (p == 1).all() and not optimizer.state.get(p)
    monkeypatch.undo()
    optimizer.step()
    assert (p < 1).all()


@linux
def test_more_than_the_disk_has_is_refused_before_it_is_touched():
    arena = paging.FileArena()
    with pytest.raises(OutputError, match="cannot be paged"):
        arena.allocate(torch.uint8, (1 << 55,), torch.device("cpu"))


PRESSURE = """
import hashlib, resource, sys, torch, halfbyte as hb
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(1 << 20)) for _ in range(32)]
for p in params:
    p.grad = torch.randn(1 << 20)
paging = dict(paged="file", page_budget=32 << 20) if sys.argv[1] == "paged" else {}
optimizer = hb.optim.AdamW(params, lr=1e-2, **paging)
warm = torch.nn.Parameter(torch.zeros(1 << 16))
warm.grad = torch.ones(1 << 16)
hb.optim.AdamW([warm]).step()
before = status("VmRSS")
if sys.argv[2] == "limited":
    limit = status("VmData") + (64 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for _ in range(3):
    optimizer.step()
grown = status("VmHWM") - before
digest = hashlib.sha256()
for p in params:
    digest.update(p.detach().numpy())
print(digest.hexdigest(), optimizer.state_nbytes, grown)
"""


def pressure(*arguments):
    command = [sys.executable, "-c", PRESSURE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@linux
@pytest.mark.slow
def test_state_of_four_times_the_memory_limit_trains_with_the_same_result():
    """256 MiB of float32 state where the process may have 64 MiB more data than before (RLIMIT_DATA)."""
    free = pressure("plain", "free").stdout.split()
    assert "memory" in pressure("plain", "limited").stderr  # without paging it does not fit
    done = pressure("paged", "limited")
    assert done.returncode == 0, done.stderr
    digest, size, grown = done.stdout.split()
    assert digest == free[0] and int(size) == 256 << 20
    # Resident: the budget of 32 MiB, and what the step's own tables and code take.
    assert int(grown) < (32 << 20) + (16 << 20) < int(free[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["float32", "8bit", "4bit"])
def test_paged_to_the_host_equals_unpaged_bit_for_bit(kind):
    def on_gpu(**options):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((500, 300), (9000,), (64, 64))]
        optimizer = hb.optim.AdamW(params, state=kind, **options)
        for step in range(4):
            generator = torch.Generator("cuda").manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        return params, optimizer

    expected, _ = on_gpu()
    found, optimizer = on_gpu(paged="host", page_budget=1 << 20)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(t.is_pinned() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
