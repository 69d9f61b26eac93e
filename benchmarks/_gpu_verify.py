"""Whether halfbyte's kernels are right on this card: python _gpu_verify.py prints a line of JSON for each variant.

A variant that has run nowhere may end the process that runs it, so gpu_suite.py has it checked in another one first.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _gpu_models import random_weight

SIZE = 4096
# Changes to this card's line of kernels/tuning.py.
VARIANTS: dict[str, dict[str, bool]] = {"plain": {}, "shuffled": {"shuffle": True}, "pairs": {"pairs": True}}
SECONDS = 150  # for all of them, most of it in the compiler


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a table."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


@contextmanager
def changed_tuning(**changes: Any) -> Iterator[None]:
    """This card's line of kernels/tuning.py with other values."""
    from halfbyte.kernels import tuning

    kept = tuning.gpu_tuning(torch.device("cuda"))
    key = next(capability for capability, line in tuning.GPU_TUNING.items() if line is kept)
    tuning.GPU_TUNING[key] = dataclasses.replace(kept, **changes)
    try:
        yield
    finally:
        tuning.GPU_TUNING[key] = kept


def check_weights() -> None:
    """Codes and decoded weights equal the reference's to the bit."""
    import halfbyte as hb
    from halfbyte.kernels import reference

    w = torch.randn(1000, SIZE, device="cuda")
    q = hb.quantize(w)
    codes, scales = reference.OPS["quantize"](w, "nf4", 64)
    expected = (codes, *reference.OPS["quantize_scales"](scales, 8))
    if not all(torch.equal(a, b) for a, b in zip(q.inner_tensors.values(), expected, strict=True)):
        raise ValueError("codes or scales differ from the reference's")
    weight = reference.OPS["dequantize"](*q.packed(), [1000, SIZE], torch.bfloat16)
    if not torch.equal(q.dequantize(torch.bfloat16), weight):
        raise ValueError("decoded weights differ from the reference's")


def check_products() -> None:
    """Products and their gradients, of few rows and many, are within the rounding of bfloat16."""
    import halfbyte as hb
    from halfbyte.kernels import reference

    for k in (SIZE, SIZE + 32):
        n = k - 3096
        q = hb.quantize(torch.randn(n, k, device="cuda"))
        weight = reference.OPS["dequantize"](*q.packed(), [n, k], torch.bfloat16)
        for rows in (1, 3, 16, 100, 600):
            x = torch.randn(rows, k, device="cuda").bfloat16()
            grad = x[:, :n].contiguous()
            y, back = torch.ops.halfbyte.linear(*q.packed(), n, x, None), torch.ops.halfbyte.linear_grad_input
            _compare(f"the product of {rows} rows", y, x.double() @ weight.double().T, 2**-8)
            _compare(f"g W of {rows} rows", back(*q.packed(), k, grad), grad.double() @ weight.double(), 2**-8)


def check_experts() -> None:
    """Products by expert: groups of none, one and many rows, and rows that belong to no expert."""
    from halfbyte.kernels import reference

    experts = random_weight(8 * 128, 512, "cuda").view(8, 128, 512)
    ends = torch.tensor([0, 1, 40, 40, 90, 300, 301, 301], device="cuda", dtype=torch.int32)
    for op, features, given in (("grouped_linear", 128, 512), ("grouped_linear_grad_input", 512, 128)):
        x = torch.randn(303, given, device="cuda").bfloat16()
        found = getattr(torch.ops.halfbyte, op)(*experts.packed(), features, x, ends)
        _compare(op, found, reference.OPS[op](*experts.packed(), features, x.double(), ends), 2**-7)


def _compare(name: str, found: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    if not error < most:
        raise ValueError(f"{name} is off by {error:.2e}")


CHECKS: tuple[Callable[[], None], ...] = (check_weights, check_products, check_experts)


def verified() -> dict[str, str]:
    """What each variant's checks said, in a process of their own: "ok" or the first thing that was wrong."""
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__))], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        said, ending = done.stdout, f"the process that checked it ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said, ending = (error.stdout or b"").decode(), f"not checked within {SECONDS} seconds"
    found: dict[str, str] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return {name: found.get(name, ending) for name in VARIANTS}


def main() -> None:
    """Check each variant."""
    torch.manual_seed(0)
    for name, changes in VARIANTS.items():
        with changed_tuning(**changes):
            wrong = []
            for check in CHECKS:
                try:
                    check()
                except Exception as error:
                    wrong.append(first_line(error))
        print(json.dumps({name: "; ".join(wrong) or "ok"}), flush=True)


if __name__ == "__main__":
    main()
