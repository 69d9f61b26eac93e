"""What the fuzzer calls with any bytes at all: each target reads them as a user would, and lets only refusals pass.

A refusal is a `HalfbyteError` of one line (the NumPy reader's own error for that one). Anything else that gets out of a
target, and a result that the two readers of archives do not agree on, is a find. `fuzz_readers.py` runs the targets
under atheris, `test_corpus.py` repeats what it found interesting.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

import halfbyte as hb
from halfbyte.errors import HalfbyteError
from halfbyte.models import Archive, describe, open_checkpoint
from halfbyte.models.archive_format import HEADER, HEADER_SIZE, encode_header
from halfbyte.models.archive_writer import new_archive
from halfbyte.tensor import flatten, is_state_key, unflatten

REPOSITORY = Path(__file__).parents[2]
_STATE = ".quant_state."


def _load_numpy_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_nf4dq", REPOSITORY / "examples" / "read_nf4dq.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


numpy_reader = _load_numpy_reader()


class Readers:
    """The targets, with a folder of their own to put their input into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def archive(self, data: bytes) -> None:
        """A file as it is: nearly everything is refused by a checksum."""
        path = self._file("a.nf4dq", data)
        accepted = _refused(lambda: _read_archive(path, verify=True)) is not None
        try:
            reader = numpy_reader.Archive(path)
            reader.verify()
        except numpy_reader.Damaged:
            assert not accepted, "halfbyte accepts what the NumPy reader refuses"

    def forged(self, data: bytes) -> None:
        """A length, that many bytes of sections, a directory; every checksum of header and directory is right."""
        path = self._file("a.nf4dq", forge(data))
        found = _refused(lambda: _read_archive(path, verify=False))
        try:
            reader = numpy_reader.Archive(path)
            theirs = {name: reader[name] for name in reader}
        except numpy_reader.Damaged as error:
            assert found is None, f"halfbyte accepts what the NumPy reader refuses: {error}"
            return
        for name, tensor in (found or {}).items():
            dense = tensor.dequantize() if isinstance(tensor, hb.QuantizedTensor) else tensor
            ours = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
            assert np.array_equal(ours, theirs[name], equal_nan=ours.dtype.kind == "f"), f"{name} differs"

    def safetensors(self, data: bytes) -> None:
        """A shard in a folder that says it is bitsandbytes'."""
        self._file("config.json", b'{"model_type": "llama", "quantization_config": {"load_in_4bit": true}}')
        self._file("model.safetensors", data)
        _refused(lambda: _read_folder(self.folder))

    def index(self, data: bytes) -> None:
        """The index of a sharded folder."""
        self._file("config.json", b'{"model_type": "llama"}')
        self._file("model.safetensors.index.json", data)
        try:
            _refused(lambda: _read_folder(self.folder))
        finally:
            (self.folder / "model.safetensors.index.json").unlink()

    def _file(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name


TARGETS = ("archive", "forged", "safetensors", "index")


def forge(data: bytes) -> bytes:
    """An archive whose sections and directory are any bytes, and whose checksums of both ends are right."""
    size = min(int.from_bytes(data[:2], "little"), max(0, len(data) - 2))
    sections, directory = data[2 : 2 + size], data[2 + size :]
    sections += bytes(-len(sections) % 64)
    return encode_header(HEADER_SIZE + len(sections), directory) + sections + directory


def unforge(archive: bytes) -> bytes:
    """The input of `forged` that gives an archive."""
    offset = HEADER.unpack(archive[:HEADER_SIZE])[4]
    return struct.pack("<H", offset - HEADER_SIZE) + archive[HEADER_SIZE:]


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Whole inputs to start from, for each target."""
    torch.manual_seed(0)
    archives = []
    for compress in (False, True):
        for spec in (("nf4", 32, 4), ("fp4", 64, None), ("int8", 32, 6), ("int4", 64, 8)):
            path = folder / "seed.nf4dq"
            with new_archive(path, {}, compress=compress) as writer:
                shape = (400, 100) if compress else (3, 33)
                writer.add("w", hb.quantize(torch.randn(shape).to(torch.bfloat16), *spec))
                writer.add("n", torch.arange(3, dtype=torch.bfloat16))
                writer.tie("t", "n")
                writer.add_file("config.json", b"{}")
            archives.append(path.read_bytes())
            path.unlink()
    packed = {f"{bits}": hb.quantize(torch.randn(5, 40), "nf4", 32, bits) for bits in (8, None)}
    shards = [save({**flatten("m.weight", tensor), "n": torch.ones(3)}) for tensor in packed.values()]
    shards.append(save(flatten("m.weight", hb.quantize(torch.randn(5, 40), "int8", 32, 6), "halfbyte")))
    index = json.dumps({"metadata": {}, "weight_map": {"n": "model.safetensors", "m": "../x.safetensors"}}).encode()
    forged = [unforge(archive) for archive in archives if len(archive) < 1 << 16]
    return {"archive": archives, "forged": forged, "safetensors": shards, "index": [index]}


def _refused(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where it refuses in one line."""
    try:
        return read()
    except HalfbyteError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, "an error that is not one line"
        return None


def _read_archive(path: Path, *, verify: bool) -> dict[str, torch.Tensor]:
    archive = Archive(path)
    if verify:
        archive.verify()
    json.dumps(describe(archive))
    for name in archive.directory.files:
        _refused(lambda name=name: archive.read_file(name))  # type: ignore[misc]
    return {name: archive.tensor(name) for name in (*archive.directory.tensors, *archive.directory.aliases)}


def _read_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quant_method in (None, "bitsandbytes")
    tensors = {key: checkpoint[key].read() for key in checkpoint}
    for key in tensors:
        if _STATE in key and is_state_key(key):
            name = key.partition(_STATE)[0]
            _refused(lambda name=name: unflatten(name, tensors).dequantize())  # type: ignore[misc]


def run(target: str) -> Callable[[bytes], None]:
    """A target, quiet and with a folder in memory where there is one."""
    warnings.simplefilter("ignore")
    base = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="halfbyte-fuzz-", dir=base if base.is_dir() else None)
    call: Callable[[bytes], None] = getattr(Readers(Path(folder)), target)
    return call
