"""The reader in examples/, written from the specification alone, finds the same bits that halfbyte loads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import halfbyte as hb
from halfbyte.models import Archive, quantize_to_archive
from halfbyte.models.archive_format import HEADER, HEADER_SIZE, encode_header
from halfbyte.models.archive_writer import new_archive


@pytest.fixture(scope="module")
def reader(repository):
    spec = importlib.util.spec_from_file_location("read_nf4dq", repository / "examples" / "read_nf4dq.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_bits(reader, path) -> None:
    theirs, ours = reader.Archive(path), Archive(path)
    theirs.verify()
    assert set(theirs) == {*ours.directory.tensors, *ours.directory.aliases}
    for name in theirs:
        tensor = ours.tensor(name)
        if isinstance(tensor, hb.QuantizedTensor):
            tensor = tensor.dequantize()
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        found = theirs[name]
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes(), name
    for name in ours.directory.files:
        assert theirs.file(name) == ours.read_file(name)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_whole_models(reader, folder_of, tmp_path, family):
    quantize_to_archive(folder_of(family), tmp_path / "a.nf4dq", hb.HalfbyteConfig(block_size=32))
    assert_same_bits(reader, tmp_path / "a.nf4dq")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 6, 4])
def test_every_encoding_and_dtype(reader, tmp_path, bits, compress):
    if compress:
        pytest.importorskip("zstandard", reason="zstandard is not installed")
    with new_archive(tmp_path / "a.nf4dq", {}, compress=compress) as archive:
        for format in ("nf4", "fp4", "e2m1", "int4", "int8"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                weight = (torch.randn(129, 77) * torch.randn(129, 1).exp()).to(dtype)
                archive.add(f"{format}.{dtype}", hb.quantize(weight, format, 32, bits))
                archive.add(f"dense.{format}.{dtype}", weight)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64):
            archive.add(f"{dtype}", torch.randint(0, 2, (3, 5)).to(dtype))
        archive.add("one number", torch.tensor(3.0))
        archive.add_file("config.json", b"{}")
    assert_same_bits(reader, tmp_path / "a.nf4dq")


def test_it_refuses_what_halfbyte_refuses(reader, tmp_path):
    path = tmp_path / "a.nf4dq"
    with new_archive(path, {}) as archive:
        archive.add("w", hb.quantize(torch.randn(7, 9), "nf4", 32, 4))
        archive.add_file("config.json", b"{}")
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in range(len(data)):
            os.pwrite(file.fileno(), bytes([data[place] ^ 1]), place)
            with pytest.raises(reader.Damaged):
                reader.Archive(path).verify()
            os.pwrite(file.fileno(), data[place : place + 1], place)
    for length in range(1, len(data)):
        os.truncate(path, len(data) - length)
        with pytest.raises(reader.Damaged):
            reader.Archive(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], ids=hex)
def test_scales_that_are_no_numbers(reader, tmp_path, bits, dtype):
    weight = hb.quantize(torch.randn(3, 64).to(dtype), "nf4", 64, None)
    weight.scales.copy_(torch.full((3,), bits, dtype=torch.int32).view(torch.float32))
    with new_archive(tmp_path / "a.nf4dq", {}) as archive:
        archive.add("w", weight)
    theirs = torch.from_numpy(reader.Archive(tmp_path / "a.nf4dq")["w"]).float()
    expected = Archive(tmp_path / "a.nf4dq").tensor("w").dequantize().float()
    assert not expected.isfinite().any() and torch.equal(theirs.isnan(), expected.isnan())
    assert torch.equal(theirs.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    "key, value",
    [("block_size", 32.0), ("scale_bits", 32.0), ("shape", ""), ("shape", [0, 1 << 61, 1 << 61])],
)
def test_it_refuses_other_forms_of_a_number(reader, tmp_path, key, value):
    path = tmp_path / "a.nf4dq"
    with new_archive(path, {}) as archive:
        archive.add("w", hb.quantize(torch.randn(1, 32), "nf4", 32, None))
    data = path.read_bytes()
    offset = HEADER.unpack(data[:HEADER_SIZE])[4]
    directory = json.loads(data[offset:])
    directory["tensors"]["w"][key] = value
    changed = json.dumps(directory).encode()
    path.write_bytes(encode_header(offset, changed) + data[HEADER_SIZE:offset] + changed)
    with pytest.raises(reader.Damaged, match="tensor w"):
        reader.Archive(path)


def test_it_is_short_and_needs_numpy_alone(repository):
    source = (repository / "examples" / "read_nf4dq.py").read_text()
    assert len(source.splitlines()) < 300
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported - {"json", "math", "re", "struct", "sys", "zlib"} == {"numpy", "zstandard"}


def test_as_a_program(repository, tmp_path):
    with new_archive(tmp_path / "a.nf4dq", {}) as archive:
        archive.add("w", torch.zeros(2, 3))
    program = repository / "examples" / "read_nf4dq.py"
    done = subprocess.run([sys.executable, program, tmp_path / "a.nf4dq"], capture_output=True, text=True, check=True)
    assert "w float32 [2, 3] dense" in done.stdout
    os.truncate(tmp_path / "a.nf4dq", 70)
    done = subprocess.run([sys.executable, program, tmp_path / "a.nf4dq"], capture_output=True, text=True)
    assert done.returncode == 1 and "its header says" in done.stderr
