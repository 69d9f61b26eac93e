"""Quantizing into a folder, streamed: what the model in memory would be saved as, whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.errors import OutputError, RequestError
from halfbyte.models import quantize_to_archive, quantize_to_folder
from halfbyte.models.folder import _shard_size

FAMILIES = ["llama", "llama-tied", "gpt2", "opt", "qwen2", "qwen3", "mixtral", "gemma", "bert"]


def task_of(family: str) -> str:
    return "encoder" if family == "bert" else "causal-lm"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def assert_same_folder(a, b) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (a / name).is_file() == (b / name).is_file()
        if (a / name).is_file():
            assert json.loads((a / name).read_text()) == json.loads((b / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_folder_is_what_the_model_in_memory_is_saved_as(folder_of, tmp_path, family):
    config = hb.HalfbyteConfig(block_size=32, quantize_embeddings=family == "qwen3")
    report = quantize_to_folder(folder_of(family), tmp_path / "streamed", config, task=task_of(family))
    model = hb.load_model(folder_of(family), quantization=config, task=task_of(family))
    hb.save_model(model, tmp_path / "saved")
    assert report == model.halfbyte_report
    assert_same_folder(tmp_path / "saved", tmp_path / "streamed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "streamed"]


@pytest.mark.parametrize("encoding", [("int8", 64, 8), ("nf4", 64, 6), ("fp4", 64, None), ("int4", 128, 4)])
def test_other_encodings_and_16_bits(folder_of, tmp_path, encoding):
    config = hb.HalfbyteConfig(*encoding)
    source = tmp_path / "source"
    hb.load_model(folder_of("llama"), dtype=torch.bfloat16).save_pretrained(source)
    quantize_to_folder(source, tmp_path / "streamed", config)
    hb.save_model(hb.load_model(source, quantization=config), tmp_path / "saved")
    assert_same_folder(tmp_path / "saved", tmp_path / "streamed")


def test_shards_are_named_indexed_and_aligned(folder_of, tmp_path):
    folder = tmp_path / "shards"
    quantize_to_folder(folder_of("llama"), folder, hb.HalfbyteConfig(block_size=32), max_shard_size="4KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
        header = (folder / name).read_bytes()
        length = int.from_bytes(header[:8], "little")
        for key, entry in json.loads(header[8 : 8 + length]).items():
            if key != "__metadata__":
                width = {"F32": 4, "U8": 1}[entry["dtype"]]
                assert (8 + length + entry["data_offsets"][0]) % width == 0, key
    whole = hb.load_model(folder_of("llama"), quantization=hb.HalfbyteConfig(block_size=32))
    again = hb.load_model(folder)
    assert all(a.same_bytes(b) for a, b in zip(packed(whole), packed(again), strict=True))


def packed(model):
    return [parameter for parameter in model.parameters() if isinstance(parameter, hb.QuantizedTensor)]


@pytest.mark.parametrize("kind", ["folder", "archive", "compressed"])
def test_what_is_4_bit_already_is_copied(folder_of, tmp_path, kind):
    """Model -> archive -> bitsandbytes folder -> archive: the same bytes all the way."""
    config, source = hb.HalfbyteConfig(block_size=32), tmp_path / "source.nf4dq"
    if kind == "compressed":
        pytest.importorskip("zstandard", reason="zstandard is not installed")
    if kind == "folder":
        source = tmp_path / "source"
        quantize_to_folder(folder_of("qwen2"), source, config)
    else:
        quantize_to_archive(folder_of("qwen2"), source, config, compress=kind == "compressed")
    quantize_to_folder(source, tmp_path / "again", config)
    hb.save_model(hb.load_model(folder_of("qwen2"), quantization=config), tmp_path / "saved")
    assert_same_folder(tmp_path / "saved", tmp_path / "again")


def test_places_and_sizes(folder_of, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize_to_folder(folder_of("llama"), tmp_path / "full", hb.HalfbyteConfig())
    for text in ("5", "5 GB", "0GB", "GB", "-1MB", "5gb"):
        with pytest.raises(RequestError, match="is no size of a shard; write it like"):
            quantize_to_folder(folder_of("llama"), tmp_path / "q", hb.HalfbyteConfig(), max_shard_size=text)
    assert _shard_size("300MB") == 300_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_failure_leaves_nothing(folder_of, tmp_path, monkeypatch):
    from halfbyte.models import folder

    def fails(*arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(folder, "_write_shard", fails)
    with pytest.raises(KeyError):
        quantize_to_folder(folder_of("llama"), tmp_path / "new" / "q", hb.HalfbyteConfig())
    assert not list(tmp_path.iterdir())


QUANTIZE = """
import sys, time
import halfbyte.models as models
from halfbyte.models import archive_writer
real = archive_writer.ArchiveWriter.add
def slow(self, *arguments):
    real(self, *arguments)
    print("tensor", flush=True)
    time.sleep(0.05)
archive_writer.ArchiveWriter.add = slow
into = models.quantize_to_archive if sys.argv[2].endswith("nf4dq") else models.quantize_to_folder
print("begin", flush=True)
into(sys.argv[1], sys.argv[2], models.HalfbyteConfig(block_size=32))
"""


@pytest.mark.parametrize("name", ["q.nf4dq", "q"])
def test_kill_minus_9_then_the_same_command_again(folder_of, tmp_path, name):
    """Killed after a few tensors, twice; then the same command finishes it from there, bit for bit."""
    source, output = folder_of("llama"), tmp_path / name
    into = quantize_to_archive if name.endswith("nf4dq") else quantize_to_folder
    into(source, tmp_path / f"expected-{name}", hb.HalfbyteConfig(block_size=32))
    for tensors in (2, 3):
        with subprocess.Popen(
            [sys.executable, "-c", QUANTIZE, source, output], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(1 + tensors):
                process.stdout.readline()
            time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
    journal = next(tmp_path.glob(".*.journal")).read_text().splitlines()
    assert len(journal) >= 1 + 3  # the request and what was finished
    into(source, output, hb.HalfbyteConfig(block_size=32))
    if output.is_file():
        assert output.read_bytes() == (tmp_path / f"expected-{name}").read_bytes()
    else:
        for file in (tmp_path / f"expected-{name}").iterdir():
            assert (output / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(os.listdir(tmp_path)) == sorted([f"expected-{name}", name])
