"""The product of single rows on a GPU, which is bound by reading the weight.

A warp takes a few rows of W and all of their columns, so that no sum crosses programs and the order of its summands is
always the same. A thread reads 16 bytes of codes at a time and looks their values up in a cache line, or in the
registers of its warp.

Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.kernels.triton.products import Branch, Product
from halfbyte.kernels.triton.weights import lane_values, looked_up, scale_at
from halfbyte.kernels.tuning import GpuTuning


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
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    words = codes.to(tl.pointer_type(tl.int32))
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    at_row = tl.program_id(1).to(tl.int64)
    base = start + row.to(tl.int64) * k
    group = tl.arange(0, GROUPS)
    word = tl.arange(0, GROUP // 8)
    total = tl.zeros([OUTPUTS, GROUPS], dtype=tl.float32)
    for first in range(0, k, GROUPS * GROUP):
        column = first + group * GROUP
        inside = (row < n)[:, None] & (column < k)[None, :]
        at = base[:, None] + column[None, :]
        packed = tl.load(
            words + (at >> 3)[:, :, None] + word[None, None, :],
            mask=inside[:, :, None],
            other=0,
        )
        # Eight codes of a word: a byte holds the earlier one in its high bits, a word the earlier byte in its low ones.
        lanes = lane_values(table, packed, SHUFFLE)
        even = tl.join(
            tl.join(looked_up(table, lanes, packed, 4, SHUFFLE), looked_up(table, lanes, packed, 20, SHUFFLE)),
            tl.join(looked_up(table, lanes, packed, 12, SHUFFLE), looked_up(table, lanes, packed, 28, SHUFFLE)),
        )
        odd = tl.join(
            tl.join(looked_up(table, lanes, packed, 0, SHUFFLE), looked_up(table, lanes, packed, 16, SHUFFLE)),
            tl.join(looked_up(table, lanes, packed, 8, SHUFFLE), looked_up(table, lanes, packed, 24, SHUFFLE)),
        )
        values = tl.reshape(tl.join(even, odd), [OUTPUTS, GROUPS, GROUP])
        index = column[:, None] + tl.arange(0, GROUP)[None, :]
        factors = tl.load(x + at_row * k + index, mask=index < k, other=0.0).to(tl.float32)
        sums = tl.sum(values * factors[None, :, :], axis=2)
        block = scale_start + at // BLOCK
        total += sums * scale_at(scales, scale_absmax, scale_offset, scale_table, block, inside, SCALE_BITS)
    y = tl.sum(total, axis=1)
    if BIAS:
        y += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    if RANK > 0:
        part = tl.arange(0, RANK)
        inputs = tl.load(branch + at_row * rank + part, mask=part < rank, other=0.0).to(tl.float32)
        inside_b = (row < n)[:, None] & (part < rank)[None, :]
        rows_of_b = tl.load(b + row.to(tl.int64)[:, None] * rank + part[None, :], mask=inside_b, other=0.0)
        y += scaling * tl.sum(rows_of_b.to(tl.float32) * inputs[None, :], axis=1)
    tl.store(out + at_row * n + row, y.to(out.dtype.element_ty), mask=row < n)


def multiply(product: Product, tuning: GpuTuning) -> None:
    """Write the product, each row by itself; no gradient."""
    weight, x = product.weight, product.x
    group = min(product.group, tuning.vector_summands)
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
        GROUP=group,
        GROUPS=tuning.vector_summands // group,
        OUTPUTS=tuning.vector_outputs,
        BIAS=product.bias is not None,
        RANK=0 if product.branch is None else product.branch.padded_rank,
        SHUFFLE=tuning.shuffle and x.is_cuda,
        num_warps=1,
        enable_fp_fusion=True,
    )
