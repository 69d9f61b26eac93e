"""Which implementation of an op runs: chosen once, when halfbyte is imported, with a reason that can be printed.

A backend is a name, the device it serves, a function that says whether it can run here and why, and one that gives its
ops. Backends are asked in the order of `BACKENDS`: one that can run serves its ops on its device, and the reference
serves every other device. Adding a backend is an entry of that tuple and changes no caller.

`HALFBYTE_KERNELS` (env.py) makes the choice explicit. An explicit choice that cannot be met is an error, never a silent
fallback.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from halfbyte import env
from halfbyte.errors import RequestError
from halfbyte.kernels import cpu, reference
from halfbyte.kernels.schema import LIBRARY, SCHEMAS
from halfbyte.kernels.tuning import too_old


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, why (a sentence fragment), and what would help where it cannot."""

    possible: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes:
        name: what `HALFBYTE_KERNELS` and `halfbyte info` call it.
        device: the device type it serves, "any" for all of them.
        dispatch_key: the torch dispatch key its ops register under ("CPU", "CUDA", or every device's).
        ops: gives op name -> implementation with that op's schema; asked only when it is available.
        available: whether it can run here.
    """

    name: str
    device: str
    dispatch_key: str
    ops: Callable[[], Mapping[str, Callable[..., Any]]]
    available: Callable[[], Availability]


@dataclass(frozen=True)
class Choice:
    """Which backend serves an op on a device, why, and what would make it faster (empty when nothing would)."""

    op: str
    device: str
    name: str
    reason: str
    remedy: str = ""


NO_CUDA = Availability(False, "this torch is built without CUDA", "on a machine with a card, install one with it")
REFERENCE_ASKED_FOR = Availability(False, "HALFBYTE_KERNELS=reference asks for it")


def cpu_available() -> Availability:
    """Whether the native library is there."""
    library = cpu.native_library()
    if isinstance(library, cpu.Missing):
        return Availability(False, library.reason, library.remedy)
    return Availability(True, f"native kernels, {library.isa}, on {library.threads}")


def triton_available() -> Availability:
    """Whether Triton's kernels run on a card of this machine, if it has one; `too_old` says on which they do not."""
    # Whether there is a device now is not asked: that would start CUDA in every process that imports halfbyte.
    if not torch.backends.cuda.is_built():
        return NO_CUDA
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed", "pip install triton")
    return Availability(True, f"Triton {version('triton')}; it compiles a kernel when it first runs")


def _triton_op(name: str, *args: Any) -> Any:
    if too_old(args[0].device):
        return reference.OPS[name](*args)
    from halfbyte.kernels.triton.ops import OPS  # importing triton takes seconds, and most processes have no card

    return OPS[name](*args)


# Those of kernels/triton/ops.py, which is not imported before one of them runs.
_TRITON_OPS = (
    "quantize",
    "dequantize",
    "dequantize_rows",
    "linear",
    "linear_lora",
    "linear_grad_input",
    "grouped_linear",
    "grouped_linear_grad_input",
)

REFERENCE = Backend(
    "reference",
    "any",
    "CompositeExplicitAutograd",
    lambda: reference.OPS,
    lambda: Availability(True, "torch operations; runs on any device"),
)
CPU = Backend("cpu", "cpu", "CPU", lambda: cpu.native_ops().table(), cpu_available)
TRITON = Backend(
    "triton", "cuda", "CUDA", lambda: {name: partial(_triton_op, name) for name in _TRITON_OPS}, triton_available
)
BACKENDS: tuple[Backend, ...] = (CPU, TRITON, REFERENCE)


def install() -> tuple[Choice, ...]:
    """Register the chosen implementation of every op with torch and return the choices. Called once, at import.

    Raises:
        RequestError: an environment variable asks for something that is not offered or not possible here.
    """
    wanted = env.kernels()
    choices = []
    for backend in BACKENDS:
        if backend is REFERENCE:
            state = Availability(True, "torch operations, for every device that has no kernels of its own")
        elif wanted == REFERENCE.name:
            continue
        else:
            state = backend.available()
        if not state.possible:
            if wanted == backend.name:
                raise RequestError(f"HALFBYTE_KERNELS={wanted!r} is not possible: {state.reason}; {state.remedy}.")
            choices += [Choice(op, backend.device, REFERENCE.name, state.reason, state.remedy) for op in SCHEMAS]
            continue
        if wanted == REFERENCE.name:
            state = Availability(True, "HALFBYTE_KERNELS=reference asks for it")
        for op, implementation in backend.ops().items():
            LIBRARY.impl(op, implementation, backend.dispatch_key)
            choices.append(Choice(op, backend.device, backend.name, state.reason, state.remedy))
    return tuple(choices)
