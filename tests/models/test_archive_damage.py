"""Whatever is wrong with an archive is one sentence that names the part, or the right data; never a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.formats.spec import SCALE_BITS
from halfbyte.kernels import cpu
from halfbyte.models import Archive
from halfbyte.models.archive_format import HEADER, HEADER_SIZE, encode_header
from halfbyte.models.archive_writer import new_archive
from halfbyte.models.sources import open_checkpoint

QUANTIZED, DENSE = "layers.0.up.weight", "norm.weight"


def write(path, compress=False):
    torch.manual_seed(0)
    with new_archive(path, {}, compress=compress) as archive:
        archive.add(QUANTIZED, hb.quantize(torch.randn(7, 100), "nf4", 32, 4))
        archive.add(DENSE, torch.arange(5, dtype=torch.bfloat16))
        archive.tie("tied.weight", DENSE)
        archive.add_file("config.json", b'{"model_type": "llama"}')
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.nf4dq")


def read_all(path) -> dict[str, torch.Tensor]:
    """What a careful user does: open, verify, take everything."""
    archive = Archive(path)
    archive.verify()
    archive.read_file("config.json")
    return {name: archive.tensor(name) for name in (*archive.directory.tensors, *archive.directory.aliases)}


def refused(path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    assert all(word in message for word in words), message
    return message


def forge(path, change) -> None:
    """Change the directory and make every checksum of header and directory right again."""
    data = path.read_bytes()
    offset = HEADER.unpack(data[:HEADER_SIZE])[4]
    directory = json.loads(data[offset:])
    changed = change(directory)
    encoded = changed if isinstance(changed, bytes) else json.dumps(directory).encode()
    path.write_bytes(encode_header(offset, encoded) + data[HEADER_SIZE:offset] + encoded)


def test_every_byte_flipped_in_turn_is_found(small):
    data = small.read_bytes()
    with small.open("r+b", buffering=0) as file:
        for place in range(len(data)):
            os.pwrite(file.fileno(), bytes([data[place] ^ 0x10]), place)
            refused(small)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    read_all(small)


def test_every_length_but_its_own_is_refused(small):
    data = small.read_bytes()
    for length in range(len(data) - 1, -1, -1):
        os.truncate(small, length)
        refused(small, "truncated" if length >= 8 else "is not an .nf4dq archive")
    small.write_bytes(data + b"\0")
    refused(small, "has bytes after its end")


def test_damage_is_named(small):
    archive = Archive(small)
    data = small.read_bytes()
    places = {
        f"tensor {QUANTIZED} (codes)": archive.directory.tensors[QUANTIZED].parts["codes"].offset,
        f"tensor {QUANTIZED} (scale_absmax)": archive.directory.tensors[QUANTIZED].parts["scale_absmax"].offset,
        f"tensor {DENSE} (data)": archive.directory.tensors[DENSE].parts["data"].offset,
        "file config.json": archive.directory.files["config.json"].offset,
        "directory": archive.nbytes - 1,
        "header": 20,
    }
    for name, place in places.items():
        small.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        refused(small, name)
    end = archive.directory.tensors[DENSE].parts["data"].offset + 10
    small.write_bytes(data[:end] + b"\1" + data[end + 1 :])
    refused(small, "padding after tensor norm.weight (data) is not zero")


def test_sections_that_changed_places(small):
    archive = Archive(small)
    a, b = (archive.directory.tensors[name].parts[part] for name, part in ((QUANTIZED, "codes"), (DENSE, "data")))
    data = bytearray(small.read_bytes())
    size = min(a.nbytes, b.nbytes)
    data[a.offset : a.offset + size], data[b.offset : b.offset + size] = (
        data[b.offset : b.offset + size],
        data[a.offset : a.offset + size],
    )
    small.write_bytes(data)
    refused(small, f"tensor {QUANTIZED} (codes)")


def test_a_newer_version_says_so(small):
    data = bytearray(small.read_bytes())
    data[8] = 2
    data[60:64] = zlib.crc32(data[:60]).to_bytes(4, "little")
    small.write_bytes(data)
    refused(small, "format version 2.0", "update halfbyte")


def at(*keys):
    """A change of one value deep in the directory."""

    def setter(value):
        def change(directory):
            inner = directory
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value

        return change

    return setter


codes = ("tensors", QUANTIZED, "codes")
FORGERIES = {
    "beyond the end": (at(*codes, "offset")(1 << 40), "up.weight"),
    "an overlap": (at("tensors", DENSE, "data", "offset")(64), "up.weight (codes)"),
    "not aligned": (at(*codes, "offset")(65), "up.weight (codes)"),
    "a negative offset": (at(*codes, "offset")(-64), "up.weight (codes)"),
    "a huge size": (at(*codes, "nbytes")(1 << 60), "up.weight (codes)"),
    "a size beyond 64 bits": (at(*codes, "nbytes")(1 << 80), "up.weight (codes)"),
    "a size that is true": (at(*codes, "nbytes")(True), "up.weight (codes)"),
    "a fraction": (at(*codes, "offset")(64.0), "up.weight (codes)"),
    "a huge shape": (at("tensors", QUANTIZED, "shape")([1 << 40, 1 << 40]), "too large"),
    "a huge size beside nothing": (at("tensors", DENSE, "shape")([0, 1 << 61, 1 << 61]), "too large"),
    "another shape": (at("tensors", QUANTIZED, "shape")([7, 101]), "its description asks for"),
    "a negative size": (at("tensors", DENSE, "shape")([-5]), "no list of sizes"),
    "many dimensions": (at("tensors", DENSE, "shape")([1] * 1000), "no list of sizes"),
    "an unknown dtype": (at("tensors", DENSE, "dtype")("float8"), "float8"),
    "a list for a dtype": (at("tensors", DENSE, "dtype")(["float32"]), "norm.weight"),
    "an unknown format": (at("tensors", QUANTIZED, "format")("nf5"), "nf5"),
    "a format that is a list": (at("tensors", QUANTIZED, "format")([]), "up.weight"),
    "an odd block": (at("tensors", QUANTIZED, "block_size")(33), "33"),
    "a block that is a fraction": (at("tensors", QUANTIZED, "block_size")(32.0), "32.0"),
    "scale bits that are a fraction": (at("tensors", QUANTIZED, "scale_bits")(4.0), "scale_bits 4.0"),
    "32 scale bits that are a fraction": (at("tensors", QUANTIZED, "scale_bits")(32.0), "scale_bits 32.0"),
    "scale bits of zero": (at("tensors", QUANTIZED, "scale_bits")(0), "scale_bits"),
    "another packing": (at("tensors", QUANTIZED, "packing")("low-first"), "low-first"),
    "a scale offset that is a word": (at("tensors", QUANTIZED, "scale_offset")("much"), "scale offset"),
    "a scale offset of 1e300": (at("tensors", QUANTIZED, "scale_offset")(1e300), "scale offset"),
    "no section": (lambda directory: directory["tensors"][QUANTIZED].pop("codes"), "up.weight (codes) is missing"),
    "another codebook": (at("codebooks", "nf4", 3)(0.5), "codebook nf4"),
    "a codebook with a truth in it": (at("codebooks", "nf4", 15)(True), "codebook nf4"),
    "no codebook": (lambda directory: directory["codebooks"].pop("nf4"), "codebook nf4"),
    "no codebooks": (lambda directory: directory.pop("codebooks"), "lacks its tables"),
    "another scale table": (at("scale_tables", "4", 3)(0.5), "scale table 4"),
    "a file name with a path": (
        lambda directory: directory["files"].update({"../config.json": directory["files"].pop("config.json")}),
        "no plain file name",
    ),
    "a hidden file": (at("files", ".bashrc")({"offset": 64, "nbytes": 0, "crc32": 0}), "no plain file name"),
    "an alias of nothing": (at("tensors", "x")({"same_as": "y"}), "x is said to be the same as 'y'"),
    "an alias of an alias": (at("tensors", "x")({"same_as": "tied.weight"}), "is said to be the same"),
    "an alias of a list": (at("tensors", "x")({"same_as": ["tied.weight"]}), "is said to be the same"),
    "a tensor that is a number": (at("tensors", DENSE)(3), "norm.weight is not described by an object"),
    "a tensor less": (lambda directory: directory["tensors"].pop(QUANTIZED), "norm.weight (data) lies at"),
    "tensors that are a list": (at("tensors")([]), "lacks files or tensors"),
    "a frame that is not there": (
        at(*codes, "zstd")({"nbytes": 350, "chunk": 1 << 18, "frames": [1]}),
        "frames that do not make up its size",
    ),
    "a chunk that is a fraction": (
        at(*codes, "zstd")({"nbytes": 350, "chunk": float(1 << 18), "frames": [350]}),
        "frames that do not make up its size",
    ),
    "a bomb": (
        at(*codes, "zstd")({"nbytes": 1 << 40, "chunk": 1 << 24, "frames": [1] * 350}),
        "up.weight (codes)",
    ),
    "not JSON": (lambda directory: b"{" + b"\xff" * 100, "not JSON"),
    "a deep nest": (lambda directory: b"[" * 100_000, "not JSON"),
    "an endless number": (lambda directory: b'{"files": ' + b"9" * 10_000 + b"}", "not JSON"),
    "a key that stands twice": (lambda directory: b'{"files": {}, "files": {}, "tensors": {}}', "a key stands twice"),
    "a string": (lambda directory: b'"nothing"', "not an object"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_directory_whose_checksums_are_right(small, name):
    change, words = FORGERIES[name]
    forge(small, change)
    refused(small, words)


def test_the_forger_itself_is_honest(small):
    forge(small, lambda directory: directory.update(extra="ignored"))
    assert torch.equal(read_all(small)[DENSE], torch.arange(5, dtype=torch.bfloat16))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_the_directory_is_read_or_refused(small, data):
    """Never another exception: a traceback is a crash with more words."""
    original = small.read_bytes()

    def change(directory):
        inner = directory
        while isinstance(inner, (dict, list)) and len(inner):
            key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(min(len(inner), 4))))
            if not isinstance(inner[key], (dict, list)) or data.draw(st.integers(0, 3)) == 0:
                inner[key] = data.draw(json_values)
                return
            inner = inner[key]

    try:
        forge(small, change)
        try:
            read_all(small)
        except HalfbyteError as error:
            assert "\n" not in str(error)
    finally:
        small.write_bytes(original)


def test_a_file_that_shrinks_after_it_was_opened(small):
    archive = Archive(small)
    os.truncate(small, 100)
    with pytest.raises(CheckpointError, match=r"became shorter, tensor layers\.0\.up\.weight \(codes\)"):
        archive.verify()
    with pytest.raises(CheckpointError, match="when it was opened and has 100 now"):
        archive.tensor(DENSE)


def test_damage_stops_a_model_from_loading_unless_verify_is_off(small):
    archive = Archive(small)
    data = bytearray(small.read_bytes())
    data[archive.directory.tensors[DENSE].parts["data"].offset] ^= 1
    small.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checksum of tensor norm\.weight"):
        open_checkpoint(small)
    assert DENSE in open_checkpoint(small, verify=False)


def test_nobody_home(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Archive(tmp_path / "nowhere.nf4dq")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Archive(tmp_path)


def test_compressed_frames(tmp_path):
    """Flipped bytes are found by the checksum; with the checksum forged, by the decoder; sizes before any decoding."""
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    path = tmp_path / "c.nf4dq"
    with new_archive(path, {}, compress=True) as archive:
        archive.add(QUANTIZED, hb.quantize(torch.randn(64, 1000)))
        archive.add_file("config.json", b"{}")
    section = Archive(path).directory.tensors[QUANTIZED].parts["codes"]
    assert 0 < section.nbytes < section.decoded == 32_000
    data = path.read_bytes()
    for place in (*range(section.offset, section.offset + 150), *range(section.offset, section.offset + 31_000, 300)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        refused(path, "up.weight (codes)")
        stored = path.read_bytes()[section.offset : section.offset + section.nbytes]
        forge(path, at(*codes, "crc32")(zlib.crc32(stored)))
        try:
            Archive(path).tensor(QUANTIZED)
        except CheckpointError as error:
            assert "up.weight (codes)" in str(error) and "\n" not in str(error)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=3),
    format=st.sampled_from(["nf4", "fp4", "e2m1", "int4", "int8"]),
    block=st.sampled_from([32, 64, 4096]),
    bits=st.sampled_from(SCALE_BITS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    compress=st.booleans(),
)
def test_round_trips(tmp_path_factory, shape, format, block, bits, dtype, compress):
    try:
        import zstandard  # noqa: F401
    except ImportError:
        compress = False
    path = tmp_path_factory.mktemp("round") / "a.nf4dq"
    dense = torch.randn(shape).to(dtype)
    packed = hb.quantize(dense, format, block, bits)
    with new_archive(path, {}, compress=compress) as archive:
        archive.add("packed", packed)
        archive.add("dense", dense)
        archive.add("whole", torch.arange(3))
        archive.add_file("config.json", b"{}")
    found = read_all(path)
    assert found["packed"].same_bytes(packed)
    assert found["dense"].dtype == dtype and torch.equal(found["dense"], dense)
    assert torch.equal(found["whole"], torch.arange(3))
    path.unlink()


SHRINK = """
import os, sys, threading
import torch
import halfbyte as hb
from halfbyte.errors import CheckpointError
from halfbyte.models import Archive

path = sys.argv[1]
archive = Archive(path)
weights = [archive.tensor(name) for name in archive.directory.tensors]
sums = [int(weight.codes.long().sum()) for weight in weights]
os.truncate(path, int(sys.argv[2]))

def use():
    # Through a kernel, on several threads; through torch; and from a thread that is not the main one.
    return weights[1] @ torch.ones(weights[1].shape[1]) if sys.argv[3] == "kernel" else weights[1].codes.long().sum()

try:
    if sys.argv[3] == "thread":
        worker = threading.Thread(target=use)
        worker.start()
        worker.join()
    else:
        use()
    print("nothing happened")
except CheckpointError as error:
    print(error)
assert int(weights[0].codes.long().sum()) == sums[0]  # what is still there is still right
print("alive")
"""


@pytest.mark.parametrize("how", ["kernel", "torch", "thread"])
def test_a_file_that_shrinks_while_it_is_mapped(tmp_path, how):
    """In a process of its own: if this fails, it ends by SIGBUS."""
    native = cpu.native_library()
    if isinstance(native, cpu.Missing):
        pytest.skip(native.reason)
    path = tmp_path / "a.nf4dq"
    with new_archive(path, {}) as archive:
        for index in range(3):
            archive.add(f"layers.{index}.weight", hb.quantize(torch.randn(512, 512)))
    section = Archive(path).directory.tensors["layers.1.weight"].parts["codes"]
    command = [sys.executable, "-c", SHRINK, str(path), str(section.offset + section.nbytes // 2), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "it became shorter while it was mapped, tensor layers.1.weight (codes) is no longer whole" in done.stdout
    assert done.stdout.endswith("alive\n")


def test_a_fault_that_is_not_ours_still_ends_the_process(small):
    """The handler stands aside for every other mapping."""
    program = (
        "import mmap, os, sys; from halfbyte.models import Archive; a = Archive(sys.argv[1]);"
        f"a.tensor({DENSE!r}); f = open(sys.argv[2], 'r+b'); m = mmap.mmap(f.fileno(), 0); os.truncate(f.name, 0); m[0]"
    )
    other = small.with_name("other")
    other.write_bytes(bytes(10_000))
    done = subprocess.run([sys.executable, "-c", program, str(small), str(other)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS, done.stderr


LIMITED = """
import resource, sys
from pathlib import Path
from halfbyte.errors import CheckpointError
from halfbyte.models import Archive

archive = Archive(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)
try:
    archive.tensor("weight")
    print("nothing happened")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how many addresses are used")
def test_a_limit_of_addresses_is_one_sentence(tmp_path):
    path = tmp_path / "a.nf4dq"
    with new_archive(path, {}) as archive:
        archive.add("weight", torch.zeros(1 << 20, dtype=torch.float32))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{path} cannot be mapped: Cannot allocate memory" in done.stdout
    assert "RLIMIT_AS" in done.stdout
