"""Measured choices between kernels, one line for each instruction set: data, not code.

`benchmarks/kernels.py --crossover` prints the times these numbers come from; the machine is named there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Where the few-row kernels of one instruction set hand over to torch's GEMM, and how it is fed.

    Attributes:
        linear_rows: rows of x up to which `linear` runs its own kernel.
        linear_rows_float: the same for float32 and float16 activations.
        grad_rows: rows of grad up to which `linear_grad_input` does; at most 32.
        panel_bytes: bytes of decoded weights that the GEMM gets at a time, to be found in the cache again.
    """

    linear_rows: int
    linear_rows_float: int
    grad_rows: int
    panel_bytes: int


TUNING: dict[str, Tuning] = {
    "generic": Tuning(linear_rows=4, linear_rows_float=4, grad_rows=4, panel_bytes=1 << 21),
    "avx2": Tuning(linear_rows=8, linear_rows_float=8, grad_rows=8, panel_bytes=1 << 21),
    "avx512": Tuning(linear_rows=8, linear_rows_float=16, grad_rows=8, panel_bytes=1 << 21),
    "avx512bf16": Tuning(linear_rows=32, linear_rows_float=16, grad_rows=8, panel_bytes=1 << 21),
    "amx": Tuning(linear_rows=384, linear_rows_float=16, grad_rows=8, panel_bytes=1 << 21),
    "neon": Tuning(linear_rows=8, linear_rows_float=8, grad_rows=8, panel_bytes=1 << 21),
}
