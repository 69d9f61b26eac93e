"""The libraries and the machine that kernels.py compares with: all measured in the same run, with the same timer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Other programs on the machine only ever add time, so each figure is the best of several; rounds alternate between the
# candidates, so that a slow minute meets all of them.
ROUNDS = 5
SECONDS_A_ROUND = 0.25


def best_times(candidates: Mapping[str, Callable[[], Any]], seconds: float = SECONDS_A_ROUND) -> dict[str, float]:
    """The best time of each candidate in seconds."""
    best = dict.fromkeys(candidates, float("inf"))
    for call in candidates.values():
        call()
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            end = time.perf_counter() + seconds
            while True:
                began = time.perf_counter()
                call()
                done = time.perf_counter()
                best[name] = min(best[name], done - began)
                if done > end:
                    break
    return best


def memory_bandwidth() -> float:
    """Bytes a second that torch's own threads read from main memory: the better of a sum and a matrix by vector."""
    x = torch.ones(1 << 13, 1 << 13)  # 256 MiB, more than a cache holds
    v = torch.ones(1 << 13)
    return x.nbytes / min(best_times({"sum": lambda: x.sum(), "mv": lambda: x @ v}).values())


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of torch's dense product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_times({"mm": lambda: torch.mm(a, b)})["mm"]


class Bitsandbytes:
    """The same weight in bitsandbytes: NF4, block 64, double-quantized."""

    def __init__(self, w: torch.Tensor, dtype: torch.dtype) -> None:
        import bitsandbytes as bnb
        from bitsandbytes import functional

        self._bnb, self._functional, self.w = bnb, functional, w
        self.codes, self.state = self.quantize()
        self.state.dtype = dtype

    def quantize(self) -> tuple[torch.Tensor, Any]:
        return self._functional.quantize_4bit(self.w, blocksize=64, compress_statistics=True, quant_type="nf4")

    def dequantize(self) -> torch.Tensor:
        return self._functional.dequantize_4bit(self.codes, self.state)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self._bnb.matmul_4bit(x, self.codes.t(), self.state)
