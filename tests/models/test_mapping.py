"""Parts of mapped files: found by their tensors, fetched, and released without a loss."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch

from halfbyte.models import mapping
from halfbyte.models.mapping import expect_rows, expect_whole, fetch_parts, map_file, mapped_parts, release

PAGE = mmap.PAGESIZE
PAGES = 2048


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(torch.randint(256, (PAGES * PAGE,), dtype=torch.uint8).numpy().tobytes())
    with path.open("r+b") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield opened


def resident(whole):
    """Which pages of a mapping are in memory."""
    seen = (ctypes.c_ubyte * PAGES)()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    assert not mincore(ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(len(whole)), seen)
    return [bool(page & 1) for page in seen]


def test_what_is_not_mapped_is_no_part(file):
    whole = map_file(file.fileno(), PAGES * PAGE, str)
    other = torch.zeros(100)
    at = whole.data_ptr()
    assert mapped_parts([other, whole[10:20], whole[:0]]) == [(at + 10, at + 20)]
    assert mapped_parts([other]) == mapped_parts([]) == []
    del whole
    assert at not in mapping._living


def test_neighbours_are_one_part(file):
    whole = map_file(file.fileno(), PAGES * PAGE, str)
    at = whole.data_ptr()
    tensors = [
        whole[8 * PAGE : 9 * PAGE],
        whole[64:PAGE],
        whole[PAGE + 64 : 2 * PAGE],
        whole[100:200].view(torch.int32),
    ]
    assert mapped_parts(tensors) == [(at + 64, at + 2 * PAGE), (at + 8 * PAGE, at + 9 * PAGE)]


@pytest.mark.skipif(mapping._MADVISE is None, reason="madvise is not told so much here")
def test_parts_come_and_go_and_what_was_written_stays(file):
    wanted = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    whole = map_file(file.fileno(), PAGES * PAGE, str)
    whole[3 * PAGE] += 1  # this process's own page from now on
    wanted[3 * PAGE] += 1
    part = mapped_parts([whole[PAGE + 1 : -PAGE]])
    expect_whole(part)
    fetch_parts(part)
    assert all(resident(whole)[1:-1])
    release(part)
    left = resident(whole)
    if all(left):
        pytest.skip("this file system keeps its pages")
    assert left[0] and left[1] and left[3] and left[-1]  # at the borders: pages that others may need
    assert sum(left) < PAGES // 2
    assert torch.equal(whole, wanted)
    expect_rows(part)
    assert torch.equal(whole, wanted)
    assert sum(resident(whole)) == PAGES
