"""The product of single rows on a GPU, which is bound by reading the weight.

A warp takes a few rows of W and all of their columns, so that no sum crosses programs and the order of its summands is
always the same. A thread takes 32 neighbours at a time, 16 bytes of codes, and multiplies what they stand for with its
part of x, which all of its rows share. Where columns or rows end inside a program it reads others again and leaves
them out: a load without a mask is one instruction.

Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.kernels.triton.products import Branch, Product
from halfbyte.kernels.triton.weights import lane_values, looked_up, scale_at
from halfbyte.kernels.tuning import GpuTuning

LOAD = tl.constexpr(32)  # weights that a thread loads at a time


@triton.jit
def quarters(x):
    """[A, B, 4] -> four of [A, B]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _plus_products(total, table, lanes, word, x, SHUFFLE: tl.constexpr):
    """`total` [OUTPUTS, GROUPS] plus those of the eight codes of `word` with `x` [1, GROUPS, 8].

    A byte holds the earlier code in its high bits, a word the earlier byte in its low ones.
    """
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 4, 2]))
    x0, x2, x4, x6 = quarters(even)
    x1, x3, x5, x7 = quarters(odd)
    total += looked_up(table, lanes, word, 4, SHUFFLE) * x0
    total += looked_up(table, lanes, word, 0, SHUFFLE) * x1
    total += looked_up(table, lanes, word, 12, SHUFFLE) * x2
    total += looked_up(table, lanes, word, 8, SHUFFLE) * x3
    total += looked_up(table, lanes, word, 20, SHUFFLE) * x4
    total += looked_up(table, lanes, word, 16, SHUFFLE) * x5
    total += looked_up(table, lanes, word, 28, SHUFFLE) * x6
    total += looked_up(table, lanes, word, 24, SHUFFLE) * x7
    return total


@triton.jit
def finish(
    y, bias, branch, b, out, row, at_row, n, rank, scaling, BIAS: tl.constexpr, RANK: tl.constexpr
):  # budget: a kernel's pointers and compile-time switches
    """Write `y` [OUTPUTS], for the outputs `row` of the row `at_row` of x, with the bias and the adapter's branch."""
    if BIAS:
        y += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    if RANK > 0:
        part = tl.arange(0, RANK)
        inputs = tl.load(branch + at_row * rank + part, mask=part < rank, other=0.0).to(tl.float32)
        inside_b = (row < n)[:, None] & (part < rank)[None, :]
        rows_of_b = tl.load(b + row.to(tl.int64)[:, None] * rank + part[None, :], mask=inside_b, other=0.0)
        y += scaling * tl.sum(rows_of_b.to(tl.float32) * inputs[None, :], axis=1)
    tl.store(out + at_row * n + row, y.to(out.dtype.element_ty), mask=row < n)


@triton.jit
def _vector_kernel(
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
    n,
    k,
    start,
    scale_start,
    rank,
    scaling,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at_row = tl.program_id(1).to(tl.int64)
    base = start + tl.minimum(row, n - 1).to(tl.int64) * k
    words = codes.to(tl.pointer_type(tl.int32)) + (base // LOAD * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    # Unsigned: a division by a power of two is then one shift.
    block_of_row, in_block = (scale_start + base // BLOCK).to(tl.uint32), (base % BLOCK).to(tl.uint32)
    factors = x + at_row * k + tl.arange(0, 8)[None, None, :]
    lanes = lane_values(table, tl.zeros([OUTPUTS, GROUPS], dtype=tl.int32), SHUFFLE)
    group = tl.arange(0, GROUPS) * LOAD
    total = tl.zeros([OUTPUTS, GROUPS], dtype=tl.float32)
    for first in range(0, k, GROUPS * LOAD):
        column = first + group
        if not WHOLE:
            column = tl.where(column < k, column, 0)
        block = block_of_row[:, None] + (in_block[:, None] + column.to(tl.uint32)[None, :]) // BLOCK
        always = tl.full([OUTPUTS, GROUPS], True, tl.int1)
        scale = scale_at(scales, scale_absmax, scale_offset, scale_table, block, always, SCALE_BITS)
        first_word, second, third, fourth = quarters(tl.load(words + (column // LOAD * 4)[None, :, None]))
        here = factors + column[None, :, None]
        sums = tl.zeros([OUTPUTS, GROUPS], dtype=tl.float32)
        sums = _plus_products(sums, table, lanes, first_word, tl.load(here).to(tl.float32), SHUFFLE)
        sums = _plus_products(sums, table, lanes, second, tl.load(here + 8).to(tl.float32), SHUFFLE)
        sums = _plus_products(sums, table, lanes, third, tl.load(here + 16).to(tl.float32), SHUFFLE)
        sums = _plus_products(sums, table, lanes, fourth, tl.load(here + 24).to(tl.float32), SHUFFLE)
        if not WHOLE:
            sums = tl.where((first + group < k)[None, :], sums, 0.0)
        total += sums * scale
    finish(tl.sum(total, axis=1), bias, branch, b, out, row, at_row, n, rank, scaling, BIAS, RANK)


def multiply(product: Product, tuning: GpuTuning) -> None:
    """Write the product, each row by itself; no gradient."""
    weight, x = product.weight, product.x
    inputs, b, scaling = product.branch or Branch(x, x, 0.0)
    _vector_kernel[(triton.cdiv(product.n, tuning.vector_outputs), product.rows)](
        *weight.pointers,
        x,
        x if product.bias is None else product.bias,
        inputs,
        b,
        product.out,
        product.n,
        product.k,
        weight.start,
        weight.scale_start,
        b.shape[-1],
        scaling,
        SCALE_BITS=weight.scale_bits,
        BLOCK=weight.block_size,
        GROUPS=tuning.vector_summands // LOAD.value,
        OUTPUTS=tuning.vector_outputs,
        WHOLE=product.k % tuning.vector_summands == 0,
        BIAS=product.bias is not None,
        RANK=0 if product.branch is None else product.branch.padded_rank,
        SHUFFLE=tuning.shuffle and x.is_cuda,
        num_warps=1,
        enable_fp_fusion=True,
    )
