"""The product of some rows on a GPU: weights are decoded into the operand of a tensor core product.

What is multiplied is the weight rounded once to the dtype of x, as the reference has it. Where the outputs alone do not
fill the card, the sum is split over programs, whose parts a second kernel adds up, always in the same order.

Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.kernels.triton.products import Branch, Product
from halfbyte.kernels.triton.weights import lane_values, looked_up, multiprocessors, scale_at
from halfbyte.kernels.tuning import GpuTuning


@triton.jit
def weight_tile(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    row,
    first,
    n,
    k,
    start,
    scale_start,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """Rows `row` [ROWS] and columns from `first` on, in float32 [ROWS, COLUMNS].

    What lies outside is some other weight, without a mask: it meets a zero of x, or is an output that nobody stores.
    """
    base = start + tl.minimum(row, n - 1).to(tl.int64) * k
    column = tl.minimum(first + tl.arange(0, COLUMNS // GROUP) * GROUP, k - GROUP)
    # Rows and groups begin at multiples of 32 weights, which the compiler has to see to load 16 bytes at once.
    begin = codes + (base // 32 * 16)[:, None] + (column // 32 * 16)[None, :]
    byte = tl.load(begin[:, :, None] + tl.arange(0, GROUP // 2)[None, None, :]).to(tl.int32)
    lanes = lane_values(table, byte, SHUFFLE)
    values = tl.join(looked_up(table, lanes, byte, 4, SHUFFLE), looked_up(table, lanes, byte, 0, SHUFFLE))
    # Unsigned: a division by a power of two is then one shift.
    in_block = (base % BLOCK).to(tl.uint32)[:, None] + column.to(tl.uint32)[None, :]
    block = (scale_start + base // BLOCK).to(tl.uint32)[:, None] + in_block // BLOCK
    always = tl.full([ROWS, COLUMNS // GROUP], True, tl.int1)
    scale = scale_at(scales, scale_absmax, scale_offset, scale_table, block, always, SCALE_BITS)
    grouped = tl.reshape(values, [ROWS, COLUMNS // GROUP, GROUP]) * scale[:, :, None]
    return tl.reshape(grouped, [ROWS, COLUMNS])


@triton.jit
def _tile_kernel(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    x,
    bias,
    branch,
    b,
    out,
    m,
    n,
    k,
    start,
    scale_start,
    rank,
    scaling,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    GRAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SHUFFLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """`out` [m, n] = x [m, k] W^T + ...; GRAD: [m, k] = x [m, n] W; SPLITS > 1: its parts, float32 [SPLITS, m, ...]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    if GRAD:
        summed = n
        outputs = k
    else:
        summed = k
        outputs = n
    x_row = x + row.to(tl.int64)[:, None] * summed
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for first in range(tl.program_id(2) * SUMMANDS, summed, SPLITS * SUMMANDS):
        total += partial_sum(
            x_row, row < m, first, summed, output, tl.program_id(1) * OUTPUTS, codes, scales, scale_absmax,
            scale_offset, table, scale_table, n, k, start, scale_start, SCALE_BITS, BLOCK, GROUP, OUTPUTS, SUMMANDS,
            GRAD, SHUFFLE, False, INTERPRETED,
        )  # fmt: skip
    inside_out = (row < m)[:, None] & (output < outputs)[None, :]
    if SPLITS > 1:
        to = out + (tl.program_id(2).to(tl.int64) * m + row)[:, None] * outputs + output[None, :]
        tl.store(to, total, mask=inside_out)
    else:
        total = _finished(total, bias, branch, b, row, output, m, n, rank, scaling, BIAS, RANK, INTERPRETED)
        to = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=inside_out)


@triton.jit
def partial_sum(
    x_row,
    inside_rows,
    first,
    summed,
    output,
    first_output,
    codes,
    scales,
    scale_absmax,
    scale_offset,
    table,
    scale_table,
    n,
    k,
    start,
    scale_start,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    GRAD: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """SUMMANDS terms, from `first` of `summed` on, of the products of rows of x with W: float32 [ROWS, OUTPUTS].

    `output` [OUTPUTS], from `first_output` on, are rows of W, or with GRAD its columns. WIDEN multiplies in float32.
    """
    summand = first + tl.arange(0, SUMMANDS)
    inside = inside_rows[:, None] & (summand < summed)[None, :]
    factors = tl.load(x_row + summand[None, :], mask=inside, other=0.0)
    if GRAD:
        weights = weight_tile(
            codes, scales, scale_absmax, scale_offset, table, scale_table, summand,
            first_output, n, k, start, scale_start, SCALE_BITS, BLOCK, GROUP, SUMMANDS, OUTPUTS, SHUFFLE,
        ).to(factors.dtype)  # fmt: skip
    else:
        tile = weight_tile(
            codes, scales, scale_absmax, scale_offset, table, scale_table, output,
            first, n, k, start, scale_start, SCALE_BITS, BLOCK, GROUP, OUTPUTS, SUMMANDS, SHUFFLE,
        )  # fmt: skip
        weights = tl.trans(tile.to(factors.dtype))
    if WIDEN:
        factors = factors.to(tl.float32)
        weights = weights.to(tl.float32)
    return dot(factors, weights, INTERPRETED)


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """Summed in float32, and float32 is not cut to TF32.

    Triton's interpreter would multiply the bits of bfloat16 as integers: for it they are widened.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _finished(
    total,
    bias,
    branch,
    b,
    row,
    output,
    m,
    n,
    rank,
    scaling,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """`total` with the bias and the adapter's branch added."""
    if BIAS:
        total += tl.load(bias + output, mask=output < n, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        part = tl.arange(0, RANK)
        inside = (row < m)[:, None] & (part < rank)[None, :]
        inputs = tl.load(branch + row.to(tl.int64)[:, None] * rank + part[None, :], mask=inside, other=0.0)
        inside_b = (output < n)[:, None] & (part < rank)[None, :]
        rows_of_b = tl.load(b + output.to(tl.int64)[:, None] * rank + part[None, :], mask=inside_b, other=0.0)
        total += scaling * dot(inputs, tl.trans(rows_of_b.to(inputs.dtype)), INTERPRETED)
    return total


@triton.jit
def _add_kernel(
    parts,
    bias,
    branch,
    b,
    out,
    m,
    outputs,
    rank,
    scaling,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """`out` [m, outputs]: the sum of `parts`, float32 [SPLITS, m, outputs], finished."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (row < m)[:, None] & (output < outputs)[None, :]
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for split in range(SPLITS):
        of_split = parts + (split * m + row).to(tl.int64)[:, None] * outputs + output[None, :]
        total += tl.load(of_split, mask=inside, other=0.0)
    total = _finished(total, bias, branch, b, row, output, m, outputs, rank, scaling, BIAS, RANK, INTERPRETED)
    to = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def multiply(product: Product, tuning: GpuTuning) -> None:
    """Write the product; x in 16 bits."""
    weight, x, rows, n, k = product.weight, product.x, product.rows, product.n, product.k
    tile = tuning.few if rows <= tuning.few.rows else tuning.many
    summed, outputs = (n, k) if product.gradient else (k, n)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))
    splits = _splits(grid[0] * grid[1], triton.cdiv(summed, tile.summands), tuning, x.device)
    parts = product.out if splits == 1 else x.new_empty((splits, rows, outputs), dtype=torch.float32)
    inputs, b, scaling = product.branch or Branch(x, x, 0.0)
    bias = x if product.bias is None else product.bias
    rank = 0 if product.branch is None else product.branch.padded_rank
    finish = {"BIAS": product.bias is not None, "RANK": rank, "INTERPRETED": x.device.type == "cpu"}
    _tile_kernel[(*grid, splits)](
        *weight.pointers,
        x,
        bias,
        inputs,
        b,
        parts,
        rows,
        n,
        k,
        weight.start,
        weight.scale_start,
        b.shape[-1],
        scaling,
        SCALE_BITS=weight.scale_bits,
        BLOCK=weight.block_size,
        GROUP=min(product.group, tile.outputs if product.gradient else tile.summands),
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        SUMMANDS=tile.summands,
        GRAD=product.gradient,
        SPLITS=splits,
        **(finish if splits == 1 else finish | {"BIAS": False, "RANK": 0}),
        SHUFFLE=tuning.shuffle and x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if splits > 1:
        sizes = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "SPLITS": splits}
        arguments = (parts, bias, inputs, b, product.out, rows, outputs, b.shape[-1], scaling)
        _add_kernel[grid](*arguments, **sizes, **finish, enable_fp_fusion=False)


def _splits(programs: int, steps: int, tuning: GpuTuning, device: torch.device) -> int:
    """In how many parts a sum of `steps` tiles is computed, where the outputs give `programs` programs."""
    wanted = triton.cdiv(tuning.programs * multiprocessors(device), programs)
    return max(min(wanted, steps // 4), 1)
