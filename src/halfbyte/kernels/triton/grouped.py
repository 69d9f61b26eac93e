"""Products of rows that are sorted by expert on a GPU: one kernel for all experts, whatever the router chose.

How many rows an expert has is known on the device only, and the host does not wait for it. The grid has as many
programs as any routing of so many rows could need; each finds its expert and its rows in the groups' ends, and those
that are too many end at once. Weights are decoded into the tiles of a product on tensor cores, as in `tiles.py`.

Weights that `tiles.py` does not take (8-bit codes, blocks that rows share within 32 columns) run on the reference,
which does wait.

Importing this module imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.kernels import reference
from halfbyte.kernels.schema import check_grouped
from halfbyte.kernels.triton.tiles import partial_sum
from halfbyte.kernels.triton.weights import shared_scales, takes, weight_beside
from halfbyte.kernels.tuning import Tile, gpu_tuning

# For float32, and for cards before 8.0: a larger tile's operands do not fit into their registers.
_NARROW = Tile(16, 32, 32, 4, 2)


@triton.jit
def _grouped_kernel(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    x,
    ends,
    out,
    m,
    experts,
    n,
    k,
    start,
    scale_start,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    GRAD: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDEN: tl.constexpr,
    SHUFFLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """`out` [m, n] = x [m, k] W_e^T; GRAD: [m, k] = x [m, n] W_e. Rows from the last end on are a group of zeros."""
    group = tl.arange(0, EXPERTS)
    # Nobody has looked at the ends: kept between 0 and m, wrong ones give wrong numbers and touch nothing else.
    end = tl.load(ends + group, mask=group < experts, other=0)
    end = tl.where(group < experts, tl.minimum(tl.maximum(end, 0), m), m)
    begin = tl.load(ends + group - 1, mask=(group > 0) & (group <= experts), other=0)
    begin = tl.minimum(tl.maximum(begin, 0), m)
    tiles = tl.where(group <= experts, (tl.maximum(end - begin, 0) + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    if expert > experts:
        return
    mine = group == expert
    last = tl.sum(tl.where(mine, end, 0), 0)
    row = tl.sum(tl.where(mine, begin + (tile - after + tiles) * ROWS, 0), 0) + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    if GRAD:
        summed = n
        outputs = k
    else:
        summed = k
        outputs = n
    x_row = x + row.to(tl.int64)[:, None] * summed
    matrix = start + expert.to(tl.int64) * n * k
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for first in range(0, tl.where(expert < experts, summed, 0), SUMMANDS):
        total += partial_sum(
            x_row, row < last, first, summed, output, tl.program_id(1) * OUTPUTS, codes, scales, scale_absmax,
            scale_offset, table, scale_table, n, k, matrix, scale_start, SCALE_BITS, BLOCK, GROUP, OUTPUTS, SUMMANDS,
            GRAD, SHUFFLE, WIDEN, INTERPRETED,
        )  # fmt: skip
    inside_out = (row < last)[:, None] & (output < outputs)[None, :]
    to = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside_out)


def grouped_linear(*args: Any) -> torch.Tensor:
    """`halfbyte::grouped_linear`: packed [experts, out, K], x [rows, K], ends int32 [experts] -> [rows, out], as x."""
    return _multiply("grouped_linear", args)


def grouped_linear_grad_input(*args: Any) -> torch.Tensor:
    """`halfbyte::grouped_linear_grad_input`: packed [experts, N, K], grad [rows, N], ends -> [rows, K], as grad."""
    return _multiply("grouped_linear_grad_input", args)


def _multiply(op: str, args: tuple[Any, ...]) -> torch.Tensor:
    gradient = op == "grouped_linear_grad_input"
    features, x, ends = args[9:]
    check_grouped(x, ends)
    experts, dtype = len(ends), x.dtype
    if not takes(dtype, x.device) or not x.numel() or not features or not experts:
        return reference.OPS[op](*args)
    rows = x.shape[0]
    n, k = (x.shape[1], features) if gradient else (features, x.shape[1])
    weight = weight_beside(args, experts * n * k, x)
    group, tuning = shared_scales(weight, k), gpu_tuning(x.device)
    if not group:
        return reference.OPS[op](*args)
    widen = dtype == torch.bfloat16 and not tuning.bfloat16
    tile = tuning.few if rows <= tuning.few.rows * min(experts, rows) else tuning.many
    if dtype == torch.float32 or not tuning.bfloat16:
        tile = _NARROW
    out = torch.empty((rows, features), dtype=dtype, device=x.device)
    # Every group that has rows may begin a tile that it does not fill.
    tiles = (rows + min(experts + 1, rows) * (tile.rows - 1)) // tile.rows
    _grouped_kernel[(tiles, triton.cdiv(features, tile.outputs))](
        *weight.pointers,
        x.contiguous(),
        ends.contiguous(),
        out,
        rows,
        experts,
        n,
        k,
        weight.start,
        weight.scale_start,
        SCALE_BITS=weight.scale_bits,
        BLOCK=weight.block_size,
        GROUP=min(group, tile.outputs if gradient else tile.summands),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        SUMMANDS=tile.summands,
        GRAD=gradient,
        EXPERTS=triton.next_power_of_2(experts + 1),
        WIDEN=widen,
        SHUFFLE=tuning.shuffle and x.is_cuda,
        INTERPRETED=x.device.type == "cpu",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return out
