"""Triton's kernels without a card: run by its interpreter against the reference, and compiled for three kinds of card.

The interpreter accepts what the compiler refuses (a constant that is assigned twice, a float64 where float32 belongs),
and computes what no card computes (bfloat16 is cut off, not rounded), so both are needed. It is chosen before triton
is imported, by an environment variable; hence processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.timeout(900),  # half a minute of work, on a machine that may have other work
]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=850,
        env={**os.environ, **environment},
        cwd=HERE.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


SUBJECTS = (("quantize", "dequantize", "pairs"), ("linear",), ("grouped",), ("decoder",), ("adamw",))


@pytest.mark.slow
@pytest.mark.parametrize("subjects", SUBJECTS, ids="-".join)
def test_kernels_equal_the_reference_under_the_interpreter(subjects, tmp_path):
    """`tests/kernels/triton`, which a card runs as it is."""
    options = ["-q", "-W", "ignore::RuntimeWarning", "-o", f"cache_dir={tmp_path}", "-p", "no:xdist"]
    files = [str(HERE / "triton" / f"test_{subject}.py") for subject in subjects]
    if "decoder" in subjects:
        files.append(str(HERE.parent / "infer" / "test_engine_on_triton.py"))
    said = run("-m", "pytest", *files, *options, TRITON_INTERPRET="1")
    assert "passed" in said


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 86, 90])
def test_every_kernel_compiles(capability, tmp_path):
    """To machine code, with ptxas of the triton package: types, shapes and layouts are the compiler's to judge."""
    said = run(str(HERE / "triton" / "compile_ahead.py"), str(capability), TRITON_CACHE_DIR=str(tmp_path))
    kernels = {"_quantize_kernel", "_dequantize_kernel", "_rows_kernel", "_vector_kernel", "_grouped_kernel", "_step"}
    kernels |= {"_norm_kernel", "_gated_kernel", "_mix_kernel", "_place_kernel", "_attend_kernel", "_join_kernel"}
    kernels.add("_pairs_kernel")
    if capability > 75:  # there, products of some rows have no tensor cores for bfloat16
        kernels |= {"_tile_kernel", "_add_kernel"}
    assert {line.split()[0] for line in said.splitlines()} == kernels
    assert f"_vector_kernel shuffled {capability}" in said


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [((3, 2), (7, 5), False), ((3, 2), (8, 0), True), ((3, 3), (7, 5), True), ((4, 0), (7, 5), True)],
)
def test_bfloat16_where_it_can_be_compiled(monkeypatch, version, capability, expected):
    """ptxas refuses what Triton 3.2 writes for compute capability 7.5; torch's operations take over."""
    import torch

    from halfbyte.kernels.triton import weights

    monkeypatch.setattr(weights, "_VERSION", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weights._compiles_bfloat16.cache_clear()
    card = torch.device("cuda", 0)
    assert weights.takes(torch.bfloat16, card) == expected
    assert weights.takes(torch.float16, card) and weights.takes(torch.float32, card)
    assert not weights.takes(torch.float64, card)
    assert weights.takes(torch.bfloat16, torch.device("cpu"))
    weights._compiles_bfloat16.cache_clear()


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device. Launches are caught, with whether somebody had chosen one."""
    import dataclasses

    import numpy as np
    import torch
    from triton.runtime.jit import JITFunction

    import halfbyte as hb
    from halfbyte.kernels import tuning
    from halfbyte.kernels.slots import make_options, random_keys
    from halfbyte.kernels.triton.adamw import TritonBatch
    from halfbyte.kernels.triton.ops import OPS
    from halfbyte.optim.states import allocate_plain, new_state, slot_of

    chosen, launched = [], {}

    class DeviceOf:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            chosen.append(self.device)

        def __exit__(self, *error):
            chosen.pop()

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, **options: launched.setdefault(self.__name__, list(chosen))
    )
    monkeypatch.setitem(tuning.GPU_TUNING, (8, 0), dataclasses.replace(tuning.GPU_TUNING[8, 0], programs=64))
    q = hb.quantize(torch.randn(64, 2048))
    OPS["quantize"](torch.zeros(5000), "nf4", 64)
    OPS["dequantize"](*q.packed(), list(q.shape), torch.bfloat16)
    OPS["dequantize_rows"](*q.packed(), 2048, torch.tensor([0]), torch.bfloat16)
    for rows in (1, 16):
        OPS["linear"](*q.packed(), 64, torch.zeros(rows, 2048, dtype=torch.bfloat16), None)
    parameter = torch.zeros(300)
    slot = slot_of(parameter, new_state(parameter, "8bit", master=False, allocate=allocate_plain), 0)
    options = make_options({"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}, 1, 1.0)
    TritonBatch([slot]).step([torch.zeros(300)], [options], [0], random_keys(1, np.full(1, 1), np.arange(1)))
    ours = ("quantize", "dequantize", "rows", "vector", "tile", "add")
    assert launched.keys() == {*(f"_{name}_kernel" for name in ours), "_step"}
    assert all(devices == [torch.device("cpu")] for devices in launched.values())
