"""Which implementation of an op runs: chosen once, when halfbyte is imported, with a reason that can be printed.

A backend is a name, the device it serves, the ops it has, and a function that says whether it can run here and why.
Backends are asked in the order of `BACKENDS`; the first that can run serves an op on its device, and the reference
serves everything that nobody else does. Native backends (a C library for the CPU, Triton for CUDA) are entries of
that tuple: adding one changes no caller.

`HALFBYTE_KERNELS` (env.py) makes the choice explicit. An explicit choice that cannot be met is an error, never a silent
fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte import env
from halfbyte.kernels import reference
from halfbyte.kernels.schema import LIBRARY, SCHEMAS


@dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes:
        name: what `HALFBYTE_KERNELS` and `halfbyte info` call it.
        dispatch_key: the torch dispatch key its ops register under ("CPU", "CUDA", or every device's).
        ops: op name -> implementation with that op's schema.
        available: whether it can run here, and the reason, a sentence fragment.
    """

    name: str
    dispatch_key: str
    ops: Mapping[str, Callable[..., Any]]
    available: Callable[[], tuple[bool, str]]


@dataclass(frozen=True)
class Choice:
    """Which backend serves an op on a device, why, and what would make it faster (empty when nothing would)."""

    op: str
    device: str
    name: str
    reason: str
    remedy: str = ""


REFERENCE = Backend(
    "reference",
    "CompositeExplicitAutograd",
    reference.OPS,
    lambda: (True, "torch operations; runs on any device"),
)
BACKENDS: tuple[Backend, ...] = (REFERENCE,)

_NO_NATIVE = "this version of halfbyte has no native kernels yet"


def install() -> tuple[Choice, ...]:
    """Register the chosen implementation of every op with torch and return the choices. Called once, at import."""
    wanted = env.kernels()
    choices = []
    for op in SCHEMAS:
        LIBRARY.impl(op, REFERENCE.ops[op], REFERENCE.dispatch_key)
        reason = "HALFBYTE_KERNELS=reference asks for it" if wanted == "reference" else _NO_NATIVE
        choices.append(Choice(op, "any", REFERENCE.name, reason))
    return tuple(choices)
