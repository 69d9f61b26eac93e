"""The product of single rows in bfloat16 on NVIDIA's cards: two weights to a lookup.

The product of a row is bound by instructions before it is bound by memory. Two codes are a byte, so a table of 256
entries holds the values of both; each of the 32 banks of the shared memory has a copy of it, so that no two threads of
a warp wait for each other. An entry has 32 bits: the earlier value rounded to bfloat16 in the low half, the later one
in the high half, which is read with the low half as its further digits, and rounded so that it is nearest with them.
A lookup is then four instructions for two weights: the byte, its address, the load, a shift. x lies in the shared
memory too, in the order in which threads want it.

A program has eight warps; each takes four rows of W and all of their columns, 64 neighbours to a thread, so that no sum
crosses warps and the order of its summands is always the same. Where rows or columns end inside a program it reads
others again; what is multiplied with them is zero, or is not stored.

All of this is PTX, which Triton's interpreter cannot read: for it PTX=False takes the same entries from memory.

Importing this module imports triton.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from halfbyte.formats import get_codebook
from halfbyte.kernels.triton.products import Branch, Product
from halfbyte.kernels.triton.vector import finish, quarters
from halfbyte.kernels.triton.weights import multiprocessors, scale_at
from halfbyte.kernels.tuning import GpuTuning

WARPS = 8
ROWS = tl.constexpr(32)  # of W, of a program
TABLE_BYTES = tl.constexpr(256 * 32 * 4)
STEP = tl.constexpr(2048)  # columns: 64 for each thread of a warp
CHUNK = tl.constexpr(4096)  # columns of x in the shared memory at a time: with the table 40 of a launch's 48 KiB

# $0: where the table begins, whose entries a program copies from $1, a row of 128 bytes of each, and behind it x.
ALLOCATE = tl.constexpr(
    """
    {
    .shared .align 16 .b8 pairs[40960];
    .reg .b32 at, to, entry<8>;
    .reg .b64 from;
    mov.u32 at, %tid.x;
    mov.u32 to, pairs;
    mov.u32 $0, to;
    mad.lo.u32 to, at, 16, to;
    shr.u32 at, at, 3;
    mad.wide.u32 from, at, 4, $1;
    """
    + "".join(f"ld.global.nc.b32 entry{i}, [from+{128 * i}];\n" for i in range(8))
    + "".join(f"st.shared.v4.b32 [to+{4096 * i}], {{entry{i}, entry{i}, entry{i}, entry{i}}};\n" for i in range(8))
    + "}"
)
# What is stored before is read behind; the address goes through, so that no reader can be moved in front of it.
SYNCHRONIZE = tl.constexpr("bar.sync 0;\nmov.u32 $0, $1;")
# The first entry of this thread's bank.
LANE = tl.constexpr(
    """
    {
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    mad.lo.u32 $0, lane, 4, $1;
    }
    """
)
# 16 bytes from $2 to $1, or zeros where $3 is 0.
STAGE = tl.constexpr(
    """
    {
    .reg .pred inside;
    .reg .b32 word<4>;
    setp.ne.b32 inside, $3, 0;
    mov.u32 word0, 0;
    mov.u32 word1, 0;
    mov.u32 word2, 0;
    mov.u32 word3, 0;
    @inside ld.global.nc.v4.b32 {word0, word1, word2, word3}, [$2];
    st.shared.v4.b32 [$1], {word0, word1, word2, word3};
    mov.u32 $0, 0;
    }
    """
)
# $3 bytes from $1 on into the second cache, where $2 is 0: compute capability 9.0 and above.
PREFETCH = tl.constexpr(
    """
    {
    .reg .pred first;
    setp.eq.u32 first, $2, 0;
    @first cp.async.bulk.prefetch.L2.global [$1], $3;
    mov.u32 $0, 0;
    }
    """
)
FETCH = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
# $1 plus the products of the eight codes of $2 with $4 to $11, by the table whose copy begins at $3.
DOT = tl.constexpr(
    "{\n.reg .b32 at, pair, early;\n.reg .f32 sum;\nmov.f32 sum, $1;\n"
    + "".join(
        f"""
        prmt.b32 at, $2, 0, {0x4440 + i};
        mad.lo.u32 at, at, 128, $3;
        ld.shared.b32 pair, [at];
        shl.b32 early, pair, 16;
        fma.rn.f32 sum, early, ${4 + 2 * i}, sum;
        fma.rn.f32 sum, pair, ${5 + 2 * i}, sum;
        """
        for i in range(4)
    )
    + "mov.f32 $0, sum;\n}"
)


@cache
def pair_table(format: str, device: torch.device | str) -> torch.Tensor:
    """Two values by the byte of their codes: int32 [256], the earlier one in the low half."""
    values = get_codebook(format).table()
    early = values.bfloat16().view(torch.int16).int()[:, None] & 0xFFFF
    # Three candidates of which one is the nearest; at zero the digits behind are a subnormal number.
    about = values.view(torch.int32)[None, :] & 0x7FFFFFFF
    sign = values.view(torch.int32)[None, :] - about
    candidates = torch.stack([((about - early >> 16) + i).clamp(min=0) << 16 | early for i in range(3)]) | sign
    error = (candidates.view(torch.float32) - values).abs()
    return candidates.gather(0, error.argmin(0)[None])[0].flatten().to(device)


def pair_values(format: str) -> torch.Tensor:
    """What the kernel multiplies by: float32 [256, 2], the earlier value first."""
    entries = pair_table(format, "cpu")
    return torch.stack([entries << 16, entries], 1).view(torch.float32)


@triton.jit
def _eight(x, staged, column, k, UNIT: tl.constexpr, PTX: tl.constexpr):
    """Numbers 8 UNIT to 8 UNIT + 7 of each group of 64, that begin at `column` [32]: two each in four int32 [1, 32]."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            FETCH,
            "=r,=r,=r,=r,r",
            [staged + UNIT * 512],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        at = column + UNIT * 8
        words = x.to(tl.pointer_type(tl.int32)) + (at // 2)[None, :, None] + tl.arange(0, 4)[None, None, :]
        a, b, c, d = quarters(tl.load(words, mask=(at < k)[None, :, None], other=0))
    return a, b, c, d


@triton.jit
def _plus_products(
    total, pairs, copies, word, x, staged, column, k, UNIT: tl.constexpr, PTX: tl.constexpr
):  # budget: a step of the kernel's loop
    """`total` [ROWS, 32] plus the products of the eight codes of `word` with the numbers that `_eight` finds.

    Words hold what comes earlier in their lower bits, but a byte the earlier of its codes in its higher ones.
    """
    a, b, c, d = _eight(x, staged, column, k, UNIT, PTX)
    x0 = (a << 16).to(tl.float32, bitcast=True)
    x1 = (a & -65536).to(tl.float32, bitcast=True)
    x2 = (b << 16).to(tl.float32, bitcast=True)
    x3 = (b & -65536).to(tl.float32, bitcast=True)
    x4 = (c << 16).to(tl.float32, bitcast=True)
    x5 = (c & -65536).to(tl.float32, bitcast=True)
    x6 = (d << 16).to(tl.float32, bitcast=True)
    x7 = (d & -65536).to(tl.float32, bitcast=True)
    if PTX:
        total = tl.inline_asm_elementwise(
            DOT,
            "=f,f,r,r,f,f,f,f,f,f,f,f",
            [total, word, copies, x0, x1, x2, x3, x4, x5, x6, x7],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        total = _plus_pair(total, pairs, word & 255, x0, x1)
        total = _plus_pair(total, pairs, (word >> 8) & 255, x2, x3)
        total = _plus_pair(total, pairs, (word >> 16) & 255, x4, x5)
        total = _plus_pair(total, pairs, (word >> 24) & 255, x6, x7)
    return total


@triton.jit
def _plus_pair(total, pairs, byte, x0, x1):
    pair = tl.load(pairs + byte)
    return total + (pair << 16).to(tl.float32, bitcast=True) * x0 + pair.to(tl.float32, bitcast=True) * x1


@triton.jit
def place_of(step, unit):
    """Where eight numbers of x are, from the table on: what the threads of a warp read at once lies together."""
    return TABLE_BYTES + ((step * 8 + unit % 8) * 32 + unit // 8) * 16


@triton.jit
def _synchronized(base):
    return tl.inline_asm_elementwise(SYNCHRONIZE, "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _stage(x, base, chunk, k):
    """Put `CHUNK` numbers of the row `x` from `chunk` on into the shared memory."""
    unit = tl.arange(0, STEP // 8)
    for step in tl.static_range(CHUNK // STEP):
        column = chunk + step * STEP + unit * 8
        to = base + place_of(step, unit)
        source = (x + column).to(tl.uint64, bitcast=True)
        inside = (column < k).to(tl.int32)
        tl.inline_asm_elementwise(STAGE, "=r,r,l,r", [to, source, inside], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _fetch_ahead(codes, begin, chunk, k):
    """Ask for the codes of `CHUNK` columns from `chunk` on, of rows that `begin` [ROWS] at these weights."""
    lane = tl.arange(0, 32)[None, :]
    source = (codes + (begin // 32 * 16 + chunk // 2)[:, None] + 0 * lane).to(tl.uint64, bitcast=True)
    length = tl.minimum(CHUNK, k - chunk) // 2
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r,r", [source, lane, length], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _pairs_kernel(
    codes,
    scales,
    scale_absmax,
    scale_offset,
    pairs,
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
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    PTX: tl.constexpr,
    AHEAD: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    at_row = tl.program_id(1).to(tl.int64)
    x += at_row * k
    base = 0
    if AHEAD:
        # Memory works while the table is filled, and on more than registers could hold.
        early = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n - 1)
        _fetch_ahead(codes, start + early.to(tl.int64) * k, 0, k)
    if PTX:
        table = pairs.to(tl.uint64, bitcast=True)
        base = tl.inline_asm_elementwise(ALLOCATE, "=r,l", [table], dtype=tl.int32, is_pure=False, pack=1)
    lane = tl.arange(0, 32)
    always = tl.full([ROWS, 32], True, tl.int1)
    for first_row in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = first_row + tl.arange(0, ROWS)
        begin = start + tl.minimum(row, n - 1).to(tl.int64) * k
        words = codes.to(tl.pointer_type(tl.int32)) + (begin // 32 * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
        # Unsigned: a division by a power of two is then one shift.
        block_of_row, in_block = (scale_start + begin // BLOCK).to(tl.uint32), (begin % BLOCK).to(tl.uint32)
        total = tl.zeros([ROWS, 32], dtype=tl.float32)
        for chunk in range(0, k, CHUNK):
            copies = tl.zeros([ROWS, 32], dtype=tl.int32)
            if PTX:
                _stage(x, base, chunk, k)
                base = _synchronized(base)
                if AHEAD and chunk + CHUNK < k:
                    _fetch_ahead(codes, begin, chunk + CHUNK, k)
                copies = tl.inline_asm_elementwise(LANE, "=r,r", [base + copies], dtype=tl.int32, is_pure=True, pack=1)
            for first in range(chunk, tl.minimum(chunk + CHUNK, k), STEP):
                column = first + lane * 64
                staged = (base + TABLE_BYTES + (first - chunk) * 2 + lane * 16)[None, :]
                # Everything that comes from memory is asked for before the first of it is waited for.
                low, high = tl.minimum(column, k - 32), tl.minimum(column + 32, k - 32)
                w0, w1, w2, w3 = quarters(tl.load(words + (low // 32 * 4)[None, :, None]))
                w4, w5, w6, w7 = quarters(tl.load(words + (high // 32 * 4)[None, :, None]))
                block = block_of_row[:, None] + (in_block[:, None] + low.to(tl.uint32)[None, :]) // BLOCK
                scale = scale_at(scales, scale_absmax, scale_offset, scale_table, block, always, SCALE_BITS)
                if GROUP == 32:
                    block = block_of_row[:, None] + (in_block[:, None] + high.to(tl.uint32)[None, :]) // BLOCK
                    second = scale_at(scales, scale_absmax, scale_offset, scale_table, block, always, SCALE_BITS)
                sums = tl.zeros([ROWS, 32], dtype=tl.float32)
                sums = _plus_products(sums, pairs, copies, w0, x, staged, column, k, 0, PTX)
                sums = _plus_products(sums, pairs, copies, w1, x, staged, column, k, 1, PTX)
                sums = _plus_products(sums, pairs, copies, w2, x, staged, column, k, 2, PTX)
                sums = _plus_products(sums, pairs, copies, w3, x, staged, column, k, 3, PTX)
                if GROUP == 32:
                    total += sums * scale
                    sums = tl.zeros([ROWS, 32], dtype=tl.float32)
                    scale = second
                sums = _plus_products(sums, pairs, copies, w4, x, staged, column, k, 4, PTX)
                sums = _plus_products(sums, pairs, copies, w5, x, staged, column, k, 5, PTX)
                sums = _plus_products(sums, pairs, copies, w6, x, staged, column, k, 6, PTX)
                sums = _plus_products(sums, pairs, copies, w7, x, staged, column, k, 7, PTX)
                total += sums * scale
            if PTX:
                base = _synchronized(base)  # nobody reads x any longer
        finish(tl.sum(total, axis=1), bias, branch, b, out, row, at_row, n, rank, scaling, BIAS, RANK)


def multiply(product: Product, tuning: GpuTuning) -> None:
    """Write the product, each row by itself; x in bfloat16, no gradient."""
    weight, x = product.weight, product.x
    if x.data_ptr() % 16:
        x = x.clone()
    inputs, b, scaling = product.branch or Branch(x, x, 0.0)
    codes, scales, absmax, offset, _, scale_table = weight.pointers
    tiles = triton.cdiv(product.n, ROWS.value)
    most = tuning.programs * multiprocessors(x.device)  # of which none waits for another, and each fills a table
    programs = triton.cdiv(tiles, triton.cdiv(tiles, most))
    _pairs_kernel[(programs, product.rows)](
        codes,
        scales,
        absmax,
        offset,
        pair_table(weight.format, x.device),
        scale_table,
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
        GROUP=min(product.group, 64),
        BIAS=product.bias is not None,
        RANK=0 if product.branch is None else product.branch.padded_rank,
        PTX=x.is_cuda,
        AHEAD=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
