"""The Triton step against the reference; without a GPU under Triton's interpreter, in a process of its own.

The interpreter computes a fused multiply-add with two roundings, so moments are compared within one and codes within
the neighbour that this may make of them; on a GPU everything has to be equal to the bit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPT = """
import sys, numpy as np, torch
from halfbyte.kernels.reference.adamw import ReferenceBatch
from halfbyte.kernels.slots import make_options, random_keys
from halfbyte.kernels.triton.adamw import TritonBatch
from halfbyte.optim.states import allocate_plain, new_state, slot_of
device = sys.argv[1]
exact = device == "cuda"
torch.manual_seed(0)
for kind in ("float32", "8bit", "4bit"):
    for dtype, master in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        for betas in ((0.9, 0.99), (0.4, 0.9)):
            slots = [[], []]
            for number, shape in enumerate(((1,), (255,), (256,), (257,), (7, 333))):
                p = torch.randn(shape).to(dtype).to(device)
                for some in slots:
                    q = p.clone()
                    some.append(slot_of(q, new_state(q, kind, master=master, allocate=allocate_plain), number))
            batches = ReferenceBatch(slots[0]), TritonBatch(slots[1])
            for step in range(1, 4):
                grads = [torch.randn(s.param.shape).to(device) for s in slots[0]]
                if step == 2:
                    grads[1] = None
                    grads = [g if g is None else g.bfloat16() for g in grads]
                group = dict(lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.1)
                options = [make_options(group, step, 0.5), make_options({**group, "lr": 1e-3}, step, 0.5)]
                which = [0, 1, 0, 1, 0]
                keys = random_keys(1, np.full(5, step), np.arange(5))
                for batch in batches:
                    batch.step(grads, options, which, keys)
            for a, b in zip(*slots):
                for name in ("param", "moment1", "moment2", "scale1", "scale2", "master"):
                    x, y = getattr(a, name), getattr(b, name)
                    if x is None:
                        continue
                    if exact or kind == "4bit":
                        assert torch.equal(x, y), (kind, dtype, name)
                    elif x.dtype == torch.uint8:
                        assert (x.int() - y.int()).abs().max() <= 1 and (x != y).float().mean() < 0.02, (kind, name)
                    else:
                        eps = 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-20
                        scale = x.float().abs().max()
                        bound = 1e-3 * scale if kind == "8bit" and name in ("param", "master") else 0
                        assert ((x.float() - y.float()).abs() <= eps * scale + bound).all(), (kind, dtype, name)
print("equal")
"""


def run(device: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_steps_equal_the_reference_under_the_interpreter():
    assert "equal" in run("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_equal_the_reference_on_a_gpu():
    assert "equal" in run("cuda")
