"""Measured choices between kernels, one line for each instruction set: data, not code.

`benchmarks/kernels.py --crossover` prints the times these numbers come from, on two cores of an Intel Xeon with AMX.
For "avx512" and "avx512bf16" ONEDNN_MAX_CPU_ISA kept torch's GEMM to the same set. "avx2" was measured so up to 32 rows
only; "generic" never, and "neon" and "neonbf16" nowhere: they are AVX2's line, with AVX512-BF16's for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

_ANY = 1 << 62  # rows: this set has a GEMM of its own for bf16, and torch's never takes over


# Rows of a decoder step up to which activations enter products in float32 whatever was asked for: so few rows go to the
# float32 kernel anyway, and rounding them first would only lose digits.
FLOAT_ROWS = 2


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
        float_panels: 16-bit activations are multiplied in float32, because torch has no fast GEMM of 16 bits for such a
            CPU: kept to AVX2, its g W of 32 rows takes 3.4 s in bf16; with AVX512, 128 rows 70 ms, and 20 in float32.
    """

    linear_rows: int
    linear_rows_float: int
    grad_rows: int
    grad_rows_float: int
    panel_bytes: int
    float_panels: bool = False


_LARGE = 1 << 24

# In the order of the fields.
TUNING: dict[str, Tuning] = {
    "generic": Tuning(4, 4, 4, 4, _LARGE, float_panels=True),
    "avx2": Tuning(8, 8, 8, 8, _LARGE, float_panels=True),
    "neon": Tuning(8, 8, 8, 8, _LARGE, float_panels=True),
    "neonbf16": Tuning(16, 8, 8, 8, _LARGE),
    "avx512": Tuning(128, 128, 16, 16, _LARGE, float_panels=True),
    "avx512bf16": Tuning(16, 128, 16, 16, _LARGE),
    "amx": Tuning(_ANY, 128, _ANY, 16, _LARGE),
}
