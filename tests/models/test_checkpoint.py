"""Tensors read as views of their file are what reading into memory gives, whatever happens to the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.errors import CheckpointError
from halfbyte.kernels import cpu
from halfbyte.models import checkpoint, mapping
from halfbyte.models.checkpoint import is_finite, open_folder

LARGE = checkpoint._LARGE // 2 + 3  # of 2 bytes each


@pytest.fixture(autouse=True)
def guarded():
    native = cpu.native_library()
    if isinstance(native, cpu.Missing):
        pytest.skip(native.reason)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], shift: int = 0) -> Path:
    """A model folder whose data begin `shift` bytes after a multiple of 8."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        dtype = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8 + shift)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    (folder / "config.json").write_text("{}")
    return folder


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "small": torch.randn(5, generator=generator),
        "bytes": torch.randint(0, 256, (checkpoint._LARGE + 1,), dtype=torch.uint8, generator=generator),
        "odd": torch.zeros(3, dtype=torch.uint8),
        "large": torch.randn(LARGE, generator=generator).to(torch.bfloat16),
    }


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_mapped_tensors_are_what_reading_gives(tmp_path, monkeypatch, shift):
    expected = tensors()
    folder = write_folder(tmp_path, expected, shift)
    read, mapped = open_folder(folder), open_folder(folder)
    mapped.map_tensors()
    views = []

    def map_file(*args):
        views.append(mapping.map_file(*args))
        return views[-1]

    monkeypatch.setattr(checkpoint, "map_file", map_file)
    before = (folder / "model.safetensors").read_bytes()
    for name, tensor in expected.items():
        for source in (read, mapped):
            found = source[name].read()
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        found.zero_()  # its own pages, not the file's
    assert (folder / "model.safetensors").read_bytes() == before
    # Two bytes a number need an even place; "small" is read in any case.
    assert len(views) == (2 if mapped["large"].offset % 2 == 0 else 1)


def test_numbers_that_are_none_are_refused_by_name(tmp_path):
    damaged = tensors()
    damaged["large"][LARGE - 2] = float("nan")
    folder = write_folder(tmp_path, damaged)
    with pytest.raises(CheckpointError, match="large holds NaN or Inf"):
        open_folder(folder)["large"].read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_whoever_takes_a_view_looks(dtype):
    view = torch.ones(3, 300_001).to(dtype)
    assert is_finite(view) and is_finite(view[:, 5:9]) and is_finite(view[:0]) and is_finite(view[0, 0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        view[2, 300_000] = bad
        assert not is_finite(view) and is_finite(view[:2]) and not is_finite(view[2, 300_000])
    assert is_finite(torch.full((9,), -1, dtype=torch.int16))


def test_a_file_that_became_shorter_before_it_is_mapped(tmp_path):
    mapped = open_folder(write_folder(tmp_path, tensors()))
    mapped.map_tensors()
    os.truncate(tmp_path / "model.safetensors", mapped["large"].offset + 5000)
    with pytest.raises(CheckpointError, match=r"cannot read large: the file became shorter$"):
        mapped["large"].read()


SHRINK = """
import os, sys
from halfbyte.errors import CheckpointError
from halfbyte.models.checkpoint import is_finite, open_folder

mapped = open_folder(sys.argv[1])
mapped.map_tensors()
tensor = mapped["large"].read()
os.truncate(mapped["large"].shard, mapped["large"].offset + 5000)
try:
    tensor.float().sum()
    [None for _ in range(1000)]
except CheckpointError as error:
    print(error)
print([str(error) for error in mapped.failures] != [], "alive")
"""


def test_a_file_that_becomes_shorter_while_it_is_mapped(tmp_path):
    """In a process of its own: if this fails, it ends by SIGBUS."""
    write_folder(tmp_path, tensors())
    done = subprocess.run([sys.executable, "-c", SHRINK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "cannot read large: the file became shorter" in done.stdout
    assert done.stdout.endswith("True alive\n")
