"""A packed weight on a GPU: what a kernel is given of it, and how one decodes it.

Every kernel takes the same six pointers and finds a weight's scale by the position of the weight in its block, so the
second level of scales is decoded where it is used and never written to memory. Products in float32 are compiled
without contraction where the reference has to be equalled to the bit: an addition fused with its multiplication rounds
once where torch rounds twice.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halfbyte.errors import FormatError, ShapeError
from halfbyte.formats import BLOCK_SIZES, SCALE_BLOCK, get_codebook
from halfbyte.formats.double_quant import scale_table
from halfbyte.formats.packing import packed_size

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_LEAST_GROUP = 32  # weights of one scale that a thread decodes from 16 bytes
LANE_VALUE = tl.constexpr(
    """
    {
    .reg .b32 lane;
    .reg .b64 at;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 at, lane, 4, $1;
    ld.global.nc.b32 $0, [at];
    }
    """
)
SHUFFLED = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
_SECOND_LEVEL = tl.constexpr(SCALE_BLOCK)


class Weight(NamedTuple):
    """A packed weight, checked, as kernels take it.

    Attributes:
        pointers: codes, scales, second-level absmax and offset, values by code, second-level values by code. What a
            weight without a second level has not is any tensor, and is not read.
        start: weights of the first block that come before this one.
        scale_start: scales of the first second-level block that come before.
        bits: of a code, 4 or 8.
        block_size: weights that share a scale.
        scale_bits: 0, 8, 6 or 4.
        format: "nf4" and so on.
    """

    pointers: tuple[torch.Tensor, ...]
    start: int
    scale_start: int
    bits: int
    block_size: int
    scale_bits: int
    format: str


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels read and write numbers of `dtype` there."""
    return dtype in _FLOATS and (dtype != torch.bfloat16 or _compiles_bfloat16(device))


@cache
def _compiles_bfloat16(device: torch.device) -> bool:
    """Triton 3.2 does not, for cards before compute capability 8.0; later ones write out what these lack."""
    if device.type != "cuda" or torch.version.hip or _VERSION >= (3, 3):
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packed_weight(args: tuple[Any, ...], count: int) -> Weight:
    """The first `count` elements that the fields of a `PackedWeight` describe.

    Raises:
        FormatError: the format, block size or width of the scales is not offered.
        ShapeError: a tensor is too short, of another dtype or on another device than the codes.
    """
    codes, scales, absmax, offset, format, block_size, scale_bits, start, scale_start = args[:9]
    book = get_codebook(format)
    check_block_size(block_size)
    if count < 0 or start < 0 or scale_start < 0:
        raise ShapeError(f"a packed weight cannot have {count} elements, from {start} of a block, {scale_start} scales")
    device = codes.device
    blocks = -(-(start + count) // block_size)
    codes = _field(codes, "codes", torch.uint8, packed_size(start + count, book.bits), device)
    table = book.table(device)
    if scale_bits == 0:
        scales = _field(scales, "scales", torch.float32, blocks, device)
        return Weight((codes, scales, scales, scales, table, table), start, 0, book.bits, block_size, 0, format)
    if scale_bits not in (8, 6, 4) or absmax is None or offset is None:
        raise FormatError(f"scale_bits {scale_bits} with a second level is not offered; choose 0, 8, 6 or 4")
    last = scale_start + blocks
    scales = _field(scales, "scales", torch.uint8, packed_size(last, scale_bits), device)
    absmax = _field(absmax, "scale_absmax", torch.float32, -(-last // SCALE_BLOCK), device)
    offset = _field(offset, "scale_offset", torch.float32, 1, device)
    pointers = (codes, scales, absmax, offset, table, scale_table(scale_bits, device))
    return Weight(pointers, start, scale_start, book.bits, block_size, scale_bits, format)


def weight_beside(args: tuple[Any, ...], count: int, x: torch.Tensor) -> Weight:
    """`packed_weight`, to be multiplied with `x`.

    Raises:
        ShapeError: `x` is on another device; or as `packed_weight`.
    """
    if x.device != args[0].device:
        raise ShapeError(f"a tensor on {x.device} cannot be multiplied by a weight on {args[0].device}")
    return packed_weight(args, count)


def shared_scales(weight: Weight, k: int) -> int:
    """Neighbours in a row of `k` that are sure to share a scale, from each multiple of it on.

    0: too few for the kernels, or the weight is no other way as they take it.
    """
    group = math.gcd(weight.block_size, k, weight.start)
    aligned = weight.pointers[0].data_ptr() % 16 == 0
    return group if weight.bits == 4 and aligned and group >= _LEAST_GROUP else 0


def multiprocessors(device: torch.device) -> int:
    """How many the card has; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is not offered."""
    if block_size not in BLOCK_SIZES:
        offered = ", ".join(map(str, BLOCK_SIZES))
        raise FormatError(f"block size {block_size!r} is not offered; choose one of: {offered}")


def _field(tensor: torch.Tensor, name: str, dtype: torch.dtype, least: int, device: torch.device) -> torch.Tensor:
    if tensor.dtype != dtype or tensor.device != device or tensor.numel() < least:
        raise ShapeError(
            f"{name} of a packed weight is {tensor.dtype} [{tensor.numel()}] on {tensor.device}; "
            f"this weight needs {dtype} [{least}] on {device}"
        )
    return tensor.contiguous()


@triton.jit
def code_at(packed, index, inside, BITS: tl.constexpr):
    """The codes at `index` (`formats.packing.gather`), int32; 0 outside."""
    if BITS == 8:
        code = tl.load(packed + index, mask=inside, other=0).to(tl.int32)
    elif BITS == 4:
        byte = tl.load(packed + (index >> 1), mask=inside, other=0).to(tl.int32)
        code = tl.where((index & 1) == 0, byte >> 4, byte & 15)
    else:
        # A code of 6 bits may straddle two bytes; one that does not must not read the byte behind the last.
        bit = index * 6
        shift = (bit & 7).to(tl.int32)
        high = tl.load(packed + (bit >> 3), mask=inside, other=0).to(tl.int32)
        low = tl.load(packed + (bit >> 3) + 1, mask=inside & (shift > 2), other=0).to(tl.int32)
        code = (((high << 8) | low) >> (10 - shift)) & 63
    return code


@triton.jit
def scale_at(scales, scale_absmax, scale_offset, scale_table, block, inside, SCALE_BITS: tl.constexpr):
    """Float32 scales of the blocks at `block`, those that come before the tensor counted; 0 outside."""
    if SCALE_BITS == 0:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    else:
        value = tl.load(scale_table + code_at(scales, block, inside, SCALE_BITS))
        spread = tl.load(scale_absmax + block // _SECOND_LEVEL, mask=inside, other=0.0)
        scale = value * spread + tl.load(scale_offset)
    return scale


@triton.jit
def value_at(table, packed, SHIFT: tl.constexpr):
    """The table's value of the code in the bits of `packed` from SHIFT on, float32.

    The table has 64 bytes, of one cache line, and begins at a multiple of them: its address and the code's offset have
    no bit in common, so that one instruction takes the code out and forms the address.
    """
    # Unsigned throughout: a sign would have to be carried into the upper half of each address.
    bits = packed.to(tl.uint32, bitcast=True)
    offset = ((bits >> (SHIFT - 2)) if SHIFT >= 2 else (bits << (2 - SHIFT))) & 60
    address = table.to(tl.uint64, bitcast=True) | offset.to(tl.uint64)
    return tl.load(address.to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def lane_values(table, like, SHUFFLE: tl.constexpr):
    """What `looked_up` takes beside the table, in the shape of `like`: each thread's entry, of its lane modulo 16."""
    if SHUFFLE:
        values = tl.inline_asm_elementwise(
            LANE_VALUE,
            "=r,l",
            [table.to(tl.uint64, bitcast=True) + tl.zeros_like(like).to(tl.uint64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        values = like
    return values


@triton.jit
def looked_up(table, lanes, packed, SHIFT: tl.constexpr, SHUFFLE: tl.constexpr):
    """`value_at`; SHUFFLE: from another lane's register, by PTX that neither Triton's interpreter nor AMD's cards know.

    The lanes hold the table twice over, so that the bit above a code, which also selects, does not matter: what is left
    of a lookup is a shift and a shuffle.
    """
    if SHUFFLE:
        value = tl.inline_asm_elementwise(
            SHUFFLED,
            "=r,r,r",
            [lanes, packed.to(tl.uint32, bitcast=True) >> SHIFT],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        value = value_at(table, packed, SHIFT)
    return value
