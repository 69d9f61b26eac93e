"""Measured choices between kernels, one line for each instruction set: data, not code.

`benchmarks/kernels.py --crossover` prints the times these numbers come from. "amx" was measured on two cores of an
Intel Xeon with AMX; the others on the same machine, where torch's GEMM has AMX and they do not: on a CPU without it
they pay for more rows than these, and should be measured again there. "neon" and "neonbf16" were measured nowhere: they
are AVX2's line, with AVX512-BF16's for bfloat16 products.
"""

from __future__ import annotations

from dataclasses import dataclass

_ANY = 1 << 62  # rows: this set has a GEMM of its own for bf16, and torch's never takes over


@dataclass(frozen=True)
class Tuning:
    """Where the kernels of one instruction set hand over to torch's GEMM, and how it is fed.

    Attributes:
        linear_rows: rows of x up to which `linear` runs its own kernel.
        linear_rows_float: the same for float32 and float16 activations.
        grad_rows: rows of grad up to which `linear_grad_input` does.
        grad_rows_float: the same for float32 and float16.
        panel_bytes: bytes of decoded weights that the GEMM gets at a time. Smaller ones stay in the cache, and the GEMM
            is slower on narrow results. 128 rows of float32 took 19.2, 17.8, 16.0 and 16.8 ms with 2, 8, 16 and 32
            MiB; 512 rows of bf16 without AMX (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) 85.8, 84.0, 81.1 and 87.9.
    """

    linear_rows: int
    linear_rows_float: int
    grad_rows: int
    grad_rows_float: int
    panel_bytes: int


TUNING: dict[str, Tuning] = {
    "generic": Tuning(linear_rows=4, linear_rows_float=4, grad_rows=4, grad_rows_float=4, panel_bytes=1 << 24),
    "avx2": Tuning(linear_rows=8, linear_rows_float=8, grad_rows=8, grad_rows_float=8, panel_bytes=1 << 24),
    "neon": Tuning(linear_rows=8, linear_rows_float=8, grad_rows=8, grad_rows_float=8, panel_bytes=1 << 24),
    "neonbf16": Tuning(linear_rows=16, linear_rows_float=8, grad_rows=8, grad_rows_float=8, panel_bytes=1 << 24),
    "avx512": Tuning(linear_rows=8, linear_rows_float=16, grad_rows=8, grad_rows_float=16, panel_bytes=1 << 24),
    "avx512bf16": Tuning(linear_rows=16, linear_rows_float=16, grad_rows=8, grad_rows_float=16, panel_bytes=1 << 24),
    "amx": Tuning(linear_rows=_ANY, linear_rows_float=16, grad_rows=_ANY, grad_rows_float=16, panel_bytes=1 << 24),
}
