"""The attention of a decoder step on a GPU: heads are rotated and put into the cache, then every row reads its slot.

How long a row's sequence is stands in a tensor and is read by the kernel, so a step has the same launches for any
length and can be captured in a CUDA graph. A sequence is read by several programs, each of which gives the sum over its
part and the sum's scale; a last kernel joins them. A row whose position is below 0 is there to fill up a graph's
shape: it stores nothing and reads nothing.

Source: FlashAttention-2, arXiv 2307.08691, and Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023).

Importing this module imports triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halfbyte.kernels.decoder import KEY_BLOCK
from halfbyte.kernels.triton.tiles import dot
from halfbyte.kernels.tuning import gpu_tuning

_MOST_SPLITS = 32
_LEAST_DOT = 16  # of each side of a product on tensor cores


class Rows(NamedTuple):
    """Where the rows of a step stand.

    Attributes:
        slots: int64 [rows].
        positions: int64 [rows]; below 0: none.
    """

    slots: torch.Tensor
    positions: torch.Tensor


class Heads(NamedTuple):
    """What a layer's attention is given of its rows, in the activations' dtype, contiguous.

    Attributes:
        query: [rows, heads * dim].
        key: [rows, kv_heads * dim].
        value: likewise.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Angles(NamedTuple):
    """Of all positions [positions, dim], contiguous."""

    cosine: torch.Tensor
    sine: torch.Tensor


class LayerCache(NamedTuple):
    """One layer of `halfbyte.kernels.decoder.Cache`."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None


class Form(NamedTuple):
    """What a layer's attention is.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        scale: of the scores.
        eps: of the norms.
        window: the last positions that a row sees, its own included; 0: all.
        query_norm: [dim], or None.
        key_norm: [dim], or None.
    """

    heads: int
    kv_heads: int
    scale: float
    eps: float
    window: int
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


@triton.jit
def _place_kernel(
    query,
    key,
    value,
    rotated,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    positions,
    cosine,
    sine,
    query_norm,
    key_norm,
    eps,
    heads,
    kv_heads,
    cached,
    dim,
    NORMS: tl.constexpr,
    BYTES: tl.constexpr,
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """One head of one row: queries and keys normed and rotated; keys and values into the cache."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    half = dim // 2
    part = tl.arange(0, HALF)
    inside = part < half
    if head < heads + kv_heads:
        if head < heads:
            source = query + (row * heads + head) * dim
            norm = query_norm
        else:
            source = key + (row * kv_heads + head - heads) * dim
            norm = key_norm
        first = tl.load(source + part, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half + part, mask=inside, other=0.0).to(tl.float32)
        if NORMS:
            rstd = tl.rsqrt(tl.sum(first * first + second * second, axis=0) / dim + eps)
            first = tl.load(norm + part, mask=inside, other=0.0).to(tl.float32) * (first * rstd)
            second = tl.load(norm + half + part, mask=inside, other=0.0).to(tl.float32) * (second * rstd)
            first = first.to(query.dtype.element_ty).to(tl.float32)
            second = second.to(query.dtype.element_ty).to(tl.float32)
        at = tl.maximum(position, 0) * dim + part
        turned = first * tl.load(cosine + at, mask=inside, other=0.0).to(tl.float32)
        turned -= second * tl.load(sine + at, mask=inside, other=0.0).to(tl.float32)
        turned_second = second * tl.load(cosine + at + half, mask=inside, other=0.0).to(tl.float32)
        turned_second += first * tl.load(sine + at + half, mask=inside, other=0.0).to(tl.float32)
        first = turned.to(query.dtype.element_ty)
        second = turned_second.to(query.dtype.element_ty)
    else:
        source = value + (row * kv_heads + head - heads - kv_heads) * dim
        first = tl.load(source + part, mask=inside, other=0.0)
        second = tl.load(source + half + part, mask=inside, other=0.0)
    if head < heads:
        tl.store(rotated + (row * heads + head) * dim + part, first, mask=inside)
        tl.store(rotated + (row * heads + head) * dim + half + part, second, mask=inside)
    elif position >= 0:
        if head < heads + kv_heads:
            base = (slot * kv_heads + head - heads) * cached
            to = keys + base * dim + position // KEYS * KEYS * dim + position % KEYS + part * KEYS
            step = half * KEYS
            scale_to = key_scales + base + position
        else:
            base = (slot * kv_heads + head - heads - kv_heads) * cached
            to = values + (base + position) * dim + part
            step = half
            scale_to = value_scales + base + position
        if BYTES:
            wide_first = first.to(tl.float32)
            wide_second = second.to(tl.float32)
            most = tl.maximum(tl.max(tl.abs(wide_first), axis=0), tl.max(tl.abs(wide_second), axis=0))
            scale = tl.where(most > 0, most / 127, 1.0)
            tl.store(scale_to, scale)
            tl.store(to, _rounded(wide_first / scale).to(tl.int8), mask=inside)
            tl.store(to + step, _rounded(wide_second / scale).to(tl.int8), mask=inside)
        else:
            tl.store(to, first.to(keys.dtype.element_ty), mask=inside)
            tl.store(to + step, second.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(x):
    """To the nearest integer, ties to even, as torch rounds: above 2^23 float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _attend_kernel(
    rotated,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    positions,
    sums,
    peaks,
    totals,
    scale,
    heads,
    kv_heads,
    cached,
    window,
    dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    BYTES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # budget: a kernel's pointers and compile-time switches
    """A part of a row's positions, for the query heads that share a key head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    shared = heads // kv_heads
    member = tl.arange(0, GROUP)
    d = tl.arange(0, DIM)
    inside_heads = (member < shared)[:, None] & (d < dim)[None, :]
    at_heads = (row * heads + head * shared + member)[:, None] * dim + d[None, :]
    queries = tl.load(rotated + at_heads, mask=inside_heads, other=0.0)
    base = (tl.load(slots + row) * kv_heads + head) * cached
    length = tl.load(positions + row).to(tl.int32) + 1
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first = begin // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(length - first, BLOCK), SPLITS) * BLOCK
    from_position = first + split * each
    peak = tl.full([GROUP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([GROUP], dtype=tl.float32)
    sum_of_values = tl.zeros([GROUP, DIM], dtype=tl.float32)
    for at in range(from_position, tl.minimum(from_position + each, length), BLOCK):
        position = at + tl.arange(0, BLOCK)
        seen = (position >= begin) & (position < length)
        at_keys = (base + position // KEYS * KEYS)[None, :] * dim + d[:, None] * KEYS + (position % KEYS)[None, :]
        key = tl.load(keys + at_keys, mask=(d < dim)[:, None] & seen[None, :], other=0.0)
        scores = dot(queries, key.to(queries.dtype), INTERPRETED) * scale
        if BYTES:
            scores *= tl.load(key_scales + base + position, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # A block that is entered has a position that is seen, so no maximum is of nothing.
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        faded = tl.exp(peak - higher)
        shares = tl.exp(scores - higher[:, None])
        total = total * faded + tl.sum(shares, axis=1)
        if BYTES:
            shares *= tl.load(value_scales + base + position, mask=seen, other=0.0)[None, :]
        at_values = (base + position)[:, None] * dim + d[None, :]
        value = tl.load(values + at_values, mask=seen[:, None] & (d < dim)[None, :], other=0.0)
        sum_of_values = sum_of_values * faded[:, None] + dot(
            shares.to(queries.dtype), value.to(queries.dtype), INTERPRETED
        )
        peak = higher
    to = (row * heads + head * shared + member) * SPLITS + split
    tl.store(peaks + to, peak, mask=member < shared)
    tl.store(totals + to, total, mask=member < shared)
    tl.store(sums + to[:, None] * dim + d[None, :], sum_of_values, mask=inside_heads)


@triton.jit
def _join_kernel(sums, peaks, totals, y, dim, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One head of one row: the parts' sums, each by the share of its own peak, over all shares."""
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM)
    peak = tl.load(peaks + at * SPLITS + split)
    total = tl.load(totals + at * SPLITS + split)
    highest = tl.max(peak, axis=0)
    weight = tl.where(total > 0, tl.exp(peak - highest), 0.0)
    whole = tl.sum(weight * total, axis=0)
    part = tl.load(
        sums + (at * SPLITS + split)[:, None] * dim + d[None, :],
        mask=(total > 0)[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(y + at * dim + d, result.to(y.dtype.element_ty), mask=d < dim)


def attend(given: Heads, rows: Rows, angles: Angles, cache: LayerCache, form: Form) -> torch.Tensor:
    """Norm and rotate heads, store keys and values, and take every row's attention over its slot.

    Rows of one slot may be in the same call, in any order: all are stored before one is read.

    Returns:
        [rows, heads * dim], in the queries' dtype.
    """
    query, key, value = given
    count, dim = query.shape[0], angles.cosine.shape[1]
    cached = cache.values.shape[2]
    rotated, y = torch.empty_like(query), torch.empty_like(query)
    in_bytes = cache.keys.dtype == torch.int8
    scales = (cache.key_scales, cache.value_scales) if in_bytes else (cache.keys, cache.values)
    _place_kernel[(count, form.heads + 2 * form.kv_heads)](
        query,
        key,
        value,
        rotated,
        cache.keys,
        cache.values,
        *scales,
        rows.slots,
        rows.positions,
        *angles,
        query if form.query_norm is None else form.query_norm,
        query if form.key_norm is None else form.key_norm,
        form.eps,
        form.heads,
        form.kv_heads,
        cached,
        dim,
        NORMS=form.query_norm is not None,
        BYTES=in_bytes,
        HALF=triton.next_power_of_2(dim // 2),
        KEYS=KEY_BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )
    padded = max(_LEAST_DOT, triton.next_power_of_2(dim))
    block = _block(query.dtype, padded, query.device)
    splits = _splits(count * form.kv_heads, triton.cdiv(cached, block), query.device)
    peaks, totals = query.new_empty((2, count * form.heads, splits), dtype=torch.float32)
    sums = query.new_empty((count * form.heads, splits, dim), dtype=torch.float32)
    _attend_kernel[(count, form.kv_heads, splits)](
        rotated,
        cache.keys,
        cache.values,
        *scales,
        rows.slots,
        rows.positions,
        sums,
        peaks,
        totals,
        form.scale,
        form.heads,
        form.kv_heads,
        cached,
        form.window,
        dim,
        GROUP=max(_LEAST_DOT, triton.next_power_of_2(form.heads // form.kv_heads)),
        DIM=padded,
        BLOCK=block,
        KEYS=KEY_BLOCK,
        SPLITS=splits,
        BYTES=in_bytes,
        INTERPRETED=query.device.type == "cpu",
        num_warps=4,
        num_stages=2,
    )
    _join_kernel[(count * form.heads,)](sums, peaks, totals, y, dim, DIM=padded, SPLITS=splits, num_warps=1)
    return y


def _block(dtype: torch.dtype, dim: int, device: torch.device) -> int:
    """Positions that a program reads at a time; with more, registers spill to memory, as compiled for 7.5 and 9.0.

    Without tensor cores a thread holds whole rows of both operands.
    """
    if dtype == torch.float32 or not gpu_tuning(device).bfloat16:
        return _LEAST_DOT
    return 64 if dim <= 128 else 32


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """In how many parts a sequence is read, a power of two: so many that all multiprocessors have two programs."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = triton.next_power_of_2(triton.cdiv(2 * multiprocessors, programs))
    return min(wanted, triton.next_power_of_2(blocks), _MOST_SPLITS)
