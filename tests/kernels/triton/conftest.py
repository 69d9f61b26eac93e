"""Where the Triton kernels' tests run: on a card, or on the CPU in a process that was started with TRITON_INTERPRET=1.

`tests/kernels/test_triton.py` starts that process. In any other without a card `tests/conftest.py`
skips these tests.
"""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _what_old_interpreters_lack(tritons_interpreter: None) -> None:
    """Loops."""


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def ops():
    """The kernels' own table: the dispatcher would give tensors on the CPU to the CPU's kernels."""
    from halfbyte.kernels.triton.ops import OPS

    return OPS


@pytest.fixture
def cast():
    """Float32 to another dtype as the kernels do it: hardware rounds, the interpreter cuts bfloat16 off."""

    def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if INTERPRETED and dtype == torch.bfloat16:
            return (x.view(torch.int32) & -65536).view(torch.float32).to(dtype)
        return x.to(dtype)

    return cast
