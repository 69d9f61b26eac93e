"""One optimizer step: time and bytes of state, beside torch, bitsandbytes and torchao in the same run.

    python benchmarks/optimizer_step.py [--rounds 5] [--small]

Two cases: one float32 matrix of 4096 x 4096 (16.7 M parameters), and 2,000 LoRA matrices of 8 x 2048. Before anything
is timed, three steps are compared with torch's fused AdamW: float32 states have to give the same parameters to the bit,
the others parameters within what their codes allow. Bytes are counted from the tensors that hold the state.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _assets import finish, table

import halfbyte as hb

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CASES = {"4096 x 4096": [(4096, 4096)], "2,000 of 8 x 2048": [(8, 2048)] * 2000}
SMALL = {"512 x 512": [(512, 512)], "50 of 8 x 512": [(8, 512)] * 50}
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def candidates() -> Iterator[tuple[str, Make]]:
    """Name and constructor of everything that can be imported here."""
    yield "torch AdamW", lambda p: torch.optim.AdamW(p, **OPTIONS)
    yield "torch AdamW fused", lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS)
    try:
        import bitsandbytes as bnb

        yield "bitsandbytes AdamW32bit", lambda p: bnb.optim.AdamW32bit(p, **OPTIONS)
        yield "bitsandbytes AdamW8bit", lambda p: bnb.optim.AdamW8bit(p, **OPTIONS)
    except ImportError as error:
        print(f"bitsandbytes is left out: {error}")
    try:
        from torchao.optim import AdamW8bit

        yield "torchao AdamW8bit", lambda p: AdamW8bit(p, **OPTIONS)
    except ImportError as error:
        print(f"torchao is left out: {error}")
    for kind in ("float32", "8bit", "4bit"):
        for paged in (False, "file"):
            name = f"halfbyte {kind}" + (" paged to a file" if paged else "")
            yield name, lambda p, kind=kind, paged=paged: hb.optim.AdamW(p, state=kind, paged=paged, **OPTIONS)
        # Peers do not look at gradients before they change anything; without that look a step reads them once.
        unseen = f"halfbyte {kind}, check_finite=False"
        yield unseen, lambda p, kind=kind: hb.optim.AdamW(p, state=kind, check_finite=False, **OPTIONS)
    yield "halfbyte 8bit, clipped", lambda p: hb.optim.AdamW(p, state="8bit", max_grad_norm=1.0, **OPTIONS)


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Weights and gradients that are the same for everyone."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; tables that parameters share are counted once."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    parts = []
    for tensor in tensors:
        parts += [getattr(tensor, n) for n in getattr(tensor, "tensor_attrs", ())] or [tensor]
    return sum({t.data_ptr(): t.nbytes for t in parts if t.numel() > 1}.values())


def check(shapes: list[tuple[int, ...]]) -> None:
    """Ours against torch's fused step."""
    few = shapes[:3]
    expected, found = parameters(few), {}
    fused = torch.optim.AdamW(expected, fused=True, **OPTIONS)
    for _ in range(3):
        fused.step()
    for kind in ("float32", "8bit", "4bit"):
        found[kind] = parameters(few)
        optimizer = hb.optim.AdamW(found[kind], state=kind, **OPTIONS)
        for _ in range(3):
            optimizer.step()
    for at, p in enumerate(expected):
        assert torch.equal(found["float32"][at], p), "float32 states do not give torch's parameters"
        moved = (p - parameters(few)[at]).norm()
        for kind, most in (("8bit", 0.05), ("4bit", 0.4)):
            error = float((found[kind][at] - p).norm() / moved)
            assert error < most, f"{kind}: the update is {error:.2f} of its size from torch's"


def measure(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and best milliseconds of a step, in rounds that alternate, and bytes of state a parameter."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    optimizers = {name: make(parameters(shapes)) for name, make in candidates()}
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: {
            "median_ms": statistics.median(times[name]),
            "best_ms": min(times[name]),
            "bytes_per_parameter": state_bytes(optimizer) / count,
        }
        for name, optimizer in optimizers.items()
    }


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes for a test of this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    for name, shapes in (SMALL if options.small else CASES).items():
        check(shapes)
        results[name] = measure(shapes, options.rounds)
        fused = results[name]["torch AdamW fused"]["best_ms"]
        rows = [
            [
                who,
                f"{one['best_ms']:.1f}",
                f"{one['median_ms']:.1f}",
                f"{fused / one['best_ms']:.2f}",
                f"{one['bytes_per_parameter']:.3f}",
            ]
            for who, one in results[name].items()
        ]
        print(f"\n{name}, float32 parameters and gradients; correctness checked first\n")
        print(table(["optimizer", "best ms", "median ms", "times torch fused", "bytes of state a parameter"], rows))
    finish("optimizer_step", {"cases": results})


if __name__ == "__main__":
    main()
