"""Where liger-kernel's operations are tested: on a card, or on the CPU in a process started with TRITON_INTERPRET=1.

`tests/nn/test_parts.py` starts that process. In any other without a card `tests/conftest.py`
skips these tests.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("liger_kernel")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if version("triton").startswith("3.2.") and not torch.cuda.is_available():
    # It asks the card for a stopwatch where kernels to be tuned are defined, which is when liger-kernel is imported.
    from triton.runtime.driver import driver

    driver.set_active(SimpleNamespace(get_benchmarker=lambda: None))


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def what_the_interpreter_lacks(monkeypatch, tritons_interpreter):
    """A float among a kernel's arguments is a tensor to the compiler, and libdevice is the card's."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # looked up late: the interpreter exchanges it
