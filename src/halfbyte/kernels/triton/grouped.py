"""Products of rows that are sorted by expert on a GPU: one kernel for all experts, whatever the router chose.

How many rows an expert has is known on the device only, and the host does not wait for it. The grid has as many
programs as any routing of so many rows could need; each finds its expert and its rows in the groups' ends, and those
that are too many end at once. Weights are decoded into the tiles of a product on tensor cores, as in `tiles.py`.

For many rows of each expert, experts are decoded and multiplied by torch's grouped GEMM, where it is fast; from how
many on is data (`tuning.GpuTuning`). It finds its rows on the device, too. What does not fit into the memory set aside
for decoded experts is done some experts at a time, and for that the host has to read the ends.

Weights that `tiles.py` does not take (8-bit codes, blocks that rows share within 32 columns) run on the reference,
which does wait.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.kernels import reference
from halfbyte.kernels.schema import check_grouped, group_bounds, split_packed
from halfbyte.kernels.triton.dequantize import decode
from halfbyte.kernels.triton.tiles import partial_sum
from halfbyte.kernels.triton.weights import packed_weight, shared_scales, takes, weight_beside
from halfbyte.kernels.tuning import GpuTuning, Tile, gpu_tuning

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
    vendors = _vendors_product(x, n, k)
    if vendors is not None and 0 < tuning.grouped_rows * experts <= rows:
        y = _decoded(vendors, args, x.contiguous(), ends, (n, k), tuning, gradient=gradient)
        if y is not None:
            return y
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


def _vendors_product(x: torch.Tensor, n: int, k: int) -> Callable[..., torch.Tensor] | None:
    """torch's grouped GEMM, if it has a kernel for these operands: in torch 2.8 and 2.9 it has no public name."""
    whole_reads = n % 8 == 0 and k % 8 == 0  # of 16 bytes
    if not x.is_cuda or x.dtype != torch.bfloat16 or not whole_reads or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return None
    found: Callable[..., torch.Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None)
    return found or getattr(torch, "_grouped_mm", None)


def _decoded(
    multiply: Callable[..., torch.Tensor],
    args: tuple[Any, ...],
    x: torch.Tensor,
    ends: torch.Tensor,
    shape: tuple[int, int],
    tuning: GpuTuning,
    *,
    gradient: bool,
) -> torch.Tensor | None:
    """The product with decoded experts; None where the host would have to read the ends and must not."""
    packed, size, experts = split_packed(args)[0], shape[0] * shape[1], len(ends)
    together = max(1, tuning.decoded_bytes // (size * x.element_size()))

    def product(first: int, count: int, rows: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        part = packed.span(first * size, count * size)
        dense = decode(packed_weight(tuple(part), count * size), count * size, x.dtype).view(count, *shape)
        return multiply(rows, dense if gradient else dense.transpose(1, 2), offs=to)

    if together >= experts:
        # Nobody has looked at the ends, see the kernel.
        y = product(0, experts, x, ends.clamp(0, len(x)).cummax(0).values.to(torch.int32))
        without = torch.arange(len(x), device=x.device) >= ends[-1]
        return y.masked_fill_(without[:, None], 0)  # torch leaves these rows as they were
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    bounds = group_bounds(x, ends)
    y = x.new_zeros((len(x), shape[1] if gradient else shape[0]))
    for first in range(0, experts, together):
        count = min(together, experts - first)
        begin, end = bounds[first][0], bounds[first + count - 1][1]
        if begin < end:
            y[begin:end] = product(first, count, x[begin:end], ends[first : first + count] - begin)
    return y
