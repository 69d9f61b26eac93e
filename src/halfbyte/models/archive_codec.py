"""Lossless compression of an archive's sections: entropy coding of codes and 8-bit scales, by zstandard.

NF4 codes of real weights are not uniform: they carry about 3.85 bits of their 4 at block 64, and 8-bit scales about 7.1
of 8. There is nothing else to find (no repeats, no order), so what is wanted is an entropy coder and no more: Zstandard
at level 1 finds no matches and codes each byte, which is a pair of codes, with Huffman's codes, within 0.4 % of the
entropy. Higher levels search longer for matches that are not there.

A section is cut into chunks that are frames of their own, so that all threads decode one tensor together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from halfbyte.errors import CheckpointError, RequestError
from halfbyte.models.archive_format import CHUNK, MAX_EXPANSION, Section

_LEVEL = 1
_local = threading.local()


def zstandard(why: str) -> Any:
    """The zstandard module.

    Args:
        why: what needs it, the beginning of a sentence.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import zstandard as module
    except ImportError:
        raise RequestError(f"{why} needs zstandard, which is not installed; pip install 'halfbyte[archive]'") from None
    return module


def compress(data: memoryview) -> list[bytes] | None:
    """The frames of a section, or None where it is smaller as it is (or so much smaller that readers refuse it)."""
    zstandard("compressing an archive")
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        frames = list(pool.map(_compress_chunk, chunks))
    size = sum(map(len, frames))
    return frames if size < len(data) <= MAX_EXPANSION * size else None


def decompress(data: memoryview, section: Section, pool: ThreadPoolExecutor) -> torch.Tensor:
    """A section's bytes: uint8 [section.decoded], in memory of their own.

    Args:
        data: the section as it is in the file.
        section: its description.
        pool: the threads to share the work.

    Raises:
        CheckpointError: a frame is damaged.
    """
    zstandard("reading a compressed archive")
    result = torch.empty(section.decoded, dtype=torch.uint8)
    target = result.numpy().data

    jobs = iter(_jobs(section.frames, section.chunk))

    def decode(_: int) -> None:
        for start, size, place in jobs:  # shared: whichever thread is free takes the next
            _decompress_chunk(data[start : start + size], target[place : min(place + section.chunk, section.decoded)])

    workers = min(torch.get_num_threads(), len(section.frames))
    if workers > 1:
        list(pool.map(decode, range(workers)))
    else:  # waking another thread takes as long as a small frame
        decode(0)
    return result


def _jobs(frames: Sequence[int], chunk: int) -> list[tuple[int, int, int]]:
    """Of each frame: where it begins, its size, and where what it holds goes."""
    jobs, start = [], 0
    for index, size in enumerate(frames):
        jobs.append((start, size, index * chunk))
        start += size
    return jobs


def _compress_chunk(chunk: memoryview) -> bytes:
    if not hasattr(_local, "compressor"):
        # A context is not safe to share; making one for each chunk costs as much as the chunk.
        _local.compressor = zstandard("compressing an archive").ZstdCompressor(level=_LEVEL)
    frame: bytes = _local.compressor.compress(chunk)
    return frame


def _decompress_chunk(frame: memoryview, target: memoryview) -> None:
    """Decode a frame to where its bytes belong; a copy would be made under the interpreter's lock, one at a time."""
    module = zstandard("reading a compressed archive")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = module.ZstdDecompressor()
    try:
        # The declared size is compared first: the decoder would set up whatever window the frame asks for.
        if module.frame_content_size(frame) != len(target):
            raise CheckpointError("a frame declares another size than its section")
        with _local.decompressor.stream_reader(frame) as reader:
            size = reader.readinto(target)
    except module.ZstdError as error:
        raise CheckpointError(f"a frame cannot be decoded: {error}") from None
    if size != len(target):
        raise CheckpointError("a frame decodes to another size than its section")
