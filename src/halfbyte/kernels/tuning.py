"""Measured choices between kernels, one line for each instruction set: data, not code.

`benchmarks/kernels.py --crossover` prints the times these numbers come from, on two cores of an Intel Xeon with AMX.
For "avx512" and "avx512bf16" ONEDNN_MAX_CPU_ISA kept torch's GEMM to the same set; their float32 lines are AMX's. That
line ends at 128 because a call takes no more rows at once: there benchmarks/kernels.py has 18.0 ms, and 19.1 dense.
"avx2" was measured so up to 32 rows only; "generic" never, and "neon" and "neonbf16" nowhere: they are AVX2's line,
with AVX512-BF16's for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

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


@dataclass(frozen=True)
class Tile:
    """How a fused product on a GPU is cut: rows of x, outputs and summands of a program, its warps, loads in flight."""

    rows: int
    outputs: int
    summands: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GpuTuning:
    """Which kernel takes a product on a GPU, and the sizes of their programs.

    Attributes:
        vector_rows: rows of x up to which each is multiplied by itself, in float32 and without tensor cores.
        linear_rows: rows up to which weights are decoded into the tiles of a product; above, the whole weight is
            decoded and multiplied by the vendor's GEMM.
        grad_rows: the same for `linear_grad_input`.
        vector_outputs: rows of W that a program of the first kind takes, with one warp.
        vector_summands: columns that it takes at a time.
        few: tiles of at most 16 rows.
        many: tiles of more.
        programs: that each multiprocessor should have; where there are fewer outputs than that, sums are split.
        decode_tile: weights that a program decodes.
        shuffle: products look values up in the registers of their warp (NVIDIA only), not in a cache line.
        pairs: single rows in bfloat16 look two values up at once in the shared memory (NVIDIA only, pairs.py).
        bfloat16: its tensor cores take it.
        grouped_rows: rows for each expert from which on experts are decoded and multiplied by torch's grouped GEMM,
            where there is one; 0: never.
        decoded_bytes: of experts that are decoded at a time, but one at least.
    """

    vector_rows: int
    linear_rows: int
    grad_rows: int
    vector_outputs: int
    vector_summands: int
    few: Tile
    many: Tile
    programs: int
    decode_tile: int
    shuffle: bool = False
    pairs: bool = False
    bfloat16: bool = True
    grouped_rows: int = 0
    decoded_bytes: int = 1 << 30


# By compute capability; another one takes the last line that is not above it. No line was measured: no card could be
# had so far. They come from counting instructions and bytes (docs/benchmarks-gpu.md), and `benchmarks/gpu_suite.py
# --crossover` prints the times that are to replace them. 7.5 has no bfloat16 in its tensor cores: nothing is fused.
# `shuffle` and `pairs` take fewer instructions and have run nowhere yet, so they wait for a card. `grouped_rows`:
# decoding moves 4.5 bytes a weight (0.94 ns for 1,000 of them at 4.8 TB/s), which the GEMM has to win back at 2 R
# operations a weight.
_FEW, _MANY = Tile(16, 32, 128, 4, 3), Tile(64, 64, 64, 4, 3)
GPU_TUNING: dict[tuple[int, int], GpuTuning] = {
    (7, 5): GpuTuning(4, 4, 0, 4, 1024, _FEW, _MANY, 4, 4096, bfloat16=False),
    (8, 0): GpuTuning(1, 128, 32, 4, 1024, _FEW, _MANY, 4, 4096),
    (9, 0): GpuTuning(1, 128, 32, 4, 1024, _FEW, _MANY, 4, 4096, grouped_rows=256),
}


OLDEST_CARD = (7, 5)  # compute capability that Triton 3.2 to 3.9 compile for


@cache
def too_old(device: torch.device) -> str:
    """Why a device is no card that Triton's kernels run on, a sentence fragment; "": it is one, or no card."""
    if device.type != "cuda" or torch.version.hip:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CARD:
        return ""
    has, needs = (".".join(map(str, one)) for one in (capability, OLDEST_CARD))
    return f"{torch.cuda.get_device_name(device)} has compute capability {has}, and Triton's kernels need {needs}"


def gpu_tuning(device: torch.device) -> GpuTuning:
    """The line of a device. Triton's interpreter, which runs on the CPU, takes that of (8, 0)."""
    if device.type != "cuda":
        return GPU_TUNING[8, 0]
    capability = (8, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    return GPU_TUNING[max((known for known in GPU_TUNING if known <= capability), default=(7, 5))]
