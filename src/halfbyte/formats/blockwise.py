"""Blockwise encoding: the reference that every kernel must equal.

A tensor is flattened row-major and cut into blocks; each block stores its largest magnitude (the *scale*, or absmax)
and, for every weight, the code whose value is nearest to ``weight / scale``. Three details are decided by bitsandbytes'
files and not by taste, because a code that differs in one weight is a file that is not equal:

* the normalised weight is ``w * (1 / absmax)`` in float32 for a whole block, but ``w / absmax`` in a partial last
  block;
* absmax is held at 1e-38 or above before that, so a block of zeros or denormals does not produce Inf or NaN (the
  *stored* scale is the true one, except in a partial last block);
* an odd count of weights is padded with the code of 0.0.

Work is done in chunks that fit a cache: a whole weight in float32, beside its 16-bit original, would be the peak of a
model's loading.
"""

from __future__ import annotations

import torch

from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.packing import pack, packed_size

# Elements worked on at once. 256 K float32 elements and their temporaries stay inside a 2 MiB cache; on a GPU the same
# loop would be bound by launches, so it takes larger bites there.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 25
_TINY = 1e-38


def quantize(w: torch.Tensor, book: Codebook, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a tensor.

    Args:
        w: float32, bfloat16, float16 or float64, any shape, any strides; float64 is rounded to float32 first.
        book: the number format.
        block_size: weights that share a scale; even.

    Returns:
        codes: uint8 [packed_size(w.numel(), book.bits)].
        scales: float32 [ceil(w.numel() / block_size)]; not finite where the block holds NaN or Inf.
    """
    flat = w.detach().reshape(-1)
    count = flat.numel()
    blocks = -(-count // block_size)
    codes = torch.empty(packed_size(count, book.bits), dtype=torch.uint8, device=w.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=w.device)
    whole = count // block_size * block_size
    chunk = _chunk(w.device)
    per_byte = 8 // book.bits
    for start in range(0, whole, chunk):
        x = flat[start : min(start + chunk, whole)].float().view(-1, block_size)
        absmax = x.abs().amax(dim=1)
        scales[start // block_size :][: absmax.numel()] = absmax
        x = x * (1.0 / absmax.clamp(min=_TINY))[:, None]
        packed = pack(_nearest_code(x.view(-1), book), book.bits)
        codes[start // per_byte :][: packed.numel()] = packed
    if whole < count:
        x = flat[whole:].float()
        absmax = x.abs().amax().clamp(min=_TINY)
        scales[-1] = absmax
        x = x / absmax
        if x.numel() % per_byte:
            x = torch.nn.functional.pad(x, (0, 1))
        codes[whole // per_byte :] = pack(_nearest_code(x, book), book.bits)
    return codes, scales


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    book: Codebook,
    block_size: int,
    count: int,
    dtype: torch.dtype,
    start: int = 0,
) -> torch.Tensor:
    """Decode ``value[code] * scale``: the product in float32 (float64 if asked for), rounded once to `dtype`.

    Args:
        codes: uint8, packed; its first code is the first of a block.
        scales: float32 [blocks].
        book: the number format.
        block_size: weights that share a scale.
        count: weights wanted.
        dtype: any floating dtype.
        start: weights of the first block to leave out; what lets a slice begin inside a block.

    Returns:
        `dtype` [count].
    """
    out = torch.empty(start + count, dtype=dtype, device=codes.device)
    per_byte = 8 // book.bits
    work = torch.float64 if dtype == torch.float64 else torch.float32
    lookup = _byte_table(book, codes.device, work)
    chunk = _chunk(codes.device)
    for begin in range(0, start + count, chunk):
        end = min(begin + chunk, start + count)
        blocks = scales[begin // block_size : -(-end // block_size)].to(work)
        # One lookup gives both weights of a byte; a last block that is partial is looked up whole and cut after.
        index = codes[begin // per_byte : -(-end // per_byte)].int()
        values = torch.nn.functional.embedding(index, lookup).view(-1)
        values = torch.nn.functional.pad(values, (0, blocks.numel() * block_size - values.numel()))
        values = values.view(-1, block_size).mul_(blocks[:, None])
        out[begin:end] = values.view(-1)[: end - begin]
    return out[start:]


def _nearest_code(x: torch.Tensor, book: Codebook) -> torch.Tensor:
    """Float32 [n] in [-1, 1] -> uint8 [n]; a tie goes to the lower value."""
    thresholds = book.thresholds(x.device)
    if thresholds.numel() > 32:
        rank = torch.bucketize(x, thresholds, out_int32=True)
    else:
        # Counting the thresholds below x is the same as searching them, and several times faster for a few of them.
        rank = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for threshold in thresholds.tolist():
            rank += x > threshold
    if book.ascending == tuple(range(len(book.values))):
        return rank.to(torch.uint8)
    return book.codes(x.device)[rank.int()]


def _byte_table(book: Codebook, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The values that each byte holds: [256, 2] for 4-bit codes, [256, 1] for 8-bit ones."""
    table = book.table(device).to(dtype)
    if book.bits == 8:
        return table[:, None]
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1)


def _chunk(device: torch.device) -> int:
    return _CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU
