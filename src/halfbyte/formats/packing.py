"""Codes to bytes and back.

A byte holds the earlier code in its *high* bits: for 4 bits ``byte = code[2i] << 4 | code[2i + 1]`` (bitsandbytes'
order), for 6 bits four codes fill three bytes, most significant first. A count that does not fill the last byte is
padded with the code given.
"""

from __future__ import annotations

import torch

# bits -> (codes in a group, bytes in a group)
_GROUPS = {4: (2, 1), 6: (4, 3), 8: (1, 1)}


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    codes, size = _GROUPS[bits]
    return -(-count // codes) * size


def pack(codes: torch.Tensor, bits: int, pad: int = 0) -> torch.Tensor:
    """Pack codes.

    Args:
        codes: uint8 [n], each below `2**bits`.
        bits: 4, 6 or 8.
        pad: the code that fills an incomplete last group.

    Returns:
        uint8 [packed_size(n, bits)].
    """
    group, _ = _GROUPS[bits]
    if group == 1:
        return codes
    if codes.numel() % group:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % group), value=pad)
    if bits == 4:
        return codes[0::2] << 4 | codes[1::2]
    a, b, c, d = codes.view(-1, 4).unbind(1)
    return torch.stack([a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d], dim=1).view(-1)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo `pack`: uint8 [packed_size(count, bits)] -> uint8 [count]."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]
    x, y, z = packed.view(-1, 3).unbind(1)
    codes = torch.stack([x >> 2, (x << 4 | y >> 4) & 63, (y << 2 | z >> 6) & 63, z & 63], dim=1)
    return codes.view(-1)[:count]


def gather(packed: torch.Tensor, bits: int, index: torch.Tensor) -> torch.Tensor:
    """The codes at `index`, without unpacking the rest.

    Args:
        packed: uint8, as `pack` returns it.
        bits: 4, 6 or 8.
        index: int64, any shape.

    Returns:
        int32, `index`'s shape.
    """
    bit = index * bits
    byte = bit >> 3
    # A code may straddle two bytes; the pair is read as one 16-bit word.
    word = packed[byte].int() << 8 | packed[(byte + 1).clamp(max=packed.numel() - 1)].int()
    codes: torch.Tensor = word >> (16 - bits - (bit & 7)).int() & (2**bits - 1)
    return codes
