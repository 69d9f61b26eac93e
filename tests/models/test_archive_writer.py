"""An archive is whole or not there; a killed run is continued; an older archive survives whatever happens."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import CheckpointError, OutputError, RequestError
from halfbyte.models import Archive, archive_codec, archive_writer
from halfbyte.models.archive_writer import new_archive

REQUEST = {"model": "a"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    packed = {f"layers.{index}.weight": hb.quantize(torch.randn(33, 70)) for index in range(3)}
    return {"embed": torch.randn(20, 8), **packed, "norm": torch.ones(3)}


def write(path, tensors, request=REQUEST):
    """Returns what was kept from before."""
    with new_archive(path, request) as archive:
        for name, tensor in tensors.items():
            archive.add(name, tensor)
        archive.tie("head", "embed")
        archive.add_file("config.json", b"{}")
        return archive.resumed


def left(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


class Killer:
    """Ends the process at the n-th operation on files, in the middle of it where it writes."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, name, original, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            if name == "pwrite":
                data = bytes(arguments[1])
                original(arguments[0], data[: len(data) // 2], *arguments[2:])
            os._exit(9)
        return original(*arguments, **options)

    def install(self) -> None:
        for name in ("pwrite", "ftruncate", "fsync"):
            original = getattr(os, name)
            setattr(os, name, lambda *a, _n=name, _o=original: self(_n, _o, *a))
        for name in ("replace", "unlink"):
            original = getattr(Path, name)
            setattr(Path, name, lambda *a, _n=name, _o=original, **k: self(_n, _o, *a, **k))


def killed_at(point: int, path, tensors) -> bool:
    """Write in a child that is killed at an operation; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            Killer(point).install()
            write(path, tensors)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_kill_at_every_operation_leaves_the_old_archive_or_the_new_one(tmp_path, tensors):
    write(tmp_path / "expected.nf4dq", tensors)
    expected = (tmp_path / "expected.nf4dq").read_bytes()
    path, kept = tmp_path / "a.nf4dq", set()
    write(path, {"old": torch.zeros(5)}, {"model": "old"})
    old = path.read_bytes()
    point = 0
    while True:
        point += 1
        path.write_bytes(old)
        if not killed_at(point, path, tensors):
            break
        assert path.read_bytes() in (old, expected)
        resumed = write(path, tensors)
        kept.add(len(resumed))
        assert path.read_bytes() == expected
        assert left(tmp_path) == ["a.nf4dq", "expected.nf4dq"]
    assert point > 20 and kept == set(range(len(tensors) + 1))  # every number of finished tensors was met


def test_killed_again_and_again(tmp_path, tensors):
    write(tmp_path / "expected.nf4dq", tensors)
    path, generator = tmp_path / "a.nf4dq", random.Random(0)
    for _ in range(40):
        if not killed_at(generator.randrange(1, 14), path, tensors):
            break
        assert not path.exists() or path.read_bytes() == (tmp_path / "expected.nf4dq").read_bytes()
    write(path, tensors)
    assert path.read_bytes() == (tmp_path / "expected.nf4dq").read_bytes()


def interrupt(path, tensors, after=3) -> None:
    with pytest.raises(KeyboardInterrupt), new_archive(path, REQUEST) as archive:
        for name in list(tensors)[:after]:
            archive.add(name, tensors[name])
        raise KeyboardInterrupt


def test_what_a_killed_run_left_is_no_archive(tmp_path, tensors):
    interrupt(tmp_path / "a.nf4dq", tensors)
    assert left(tmp_path) == [".a.nf4dq.journal", ".a.nf4dq.partial"]
    with pytest.raises(CheckpointError, match=r"is not an \.nf4dq archive"):
        Archive(tmp_path / ".a.nf4dq.partial")


@pytest.mark.parametrize("place", [64, 64 + 640, 1500])
def test_a_kept_section_that_is_damaged_is_written_again_with_all_that_follow(tmp_path, tensors, place):
    write(tmp_path / "expected.nf4dq", tensors)
    interrupt(tmp_path / "a.nf4dq", tensors)
    with (tmp_path / ".a.nf4dq.partial").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    assert len(write(tmp_path / "a.nf4dq", tensors)) == (0 if place == 64 else 1)
    assert (tmp_path / "a.nf4dq").read_bytes() == (tmp_path / "expected.nf4dq").read_bytes()


def test_a_torn_journal_is_read_up_to_the_tear(tmp_path, tensors):
    write(tmp_path / "expected.nf4dq", tensors)
    interrupt(tmp_path / "a.nf4dq", tensors)
    journal = tmp_path / ".a.nf4dq.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert len(write(tmp_path / "a.nf4dq", tensors)) == 2
    assert (tmp_path / "a.nf4dq").read_bytes() == (tmp_path / "expected.nf4dq").read_bytes()


def test_another_request_starts_anew(tmp_path, tensors):
    interrupt(tmp_path / "a.nf4dq", tensors)
    other = {name: tensor for name, tensor in tensors.items() if name != "embed"} | {"embed": torch.zeros(2)}
    assert write(tmp_path / "a.nf4dq", other, {"model": "b"}) == set()
    assert torch.equal(Archive(tmp_path / "a.nf4dq").tensor("head"), torch.zeros(2))


def test_a_failure_leaves_nothing_and_the_old_archive(tmp_path, tensors):
    write(tmp_path / "a.nf4dq", {"embed": torch.zeros(5)})
    old = (tmp_path / "a.nf4dq").read_bytes()
    with pytest.raises(KeyError), new_archive(tmp_path / "a.nf4dq", REQUEST) as archive:
        archive.add("x", torch.ones(3))
        raise KeyError("a bug")
    assert left(tmp_path) == ["a.nf4dq"] and (tmp_path / "a.nf4dq").read_bytes() == old


def test_a_full_disk_is_a_sentence(tmp_path, tensors, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="the disk that holds"), new_archive(tmp_path / "a.nf4dq", {}) as archive:
        monkeypatch.setattr(os, "pwrite", full)
        archive.add("x", torch.ones(3))
    assert not left(tmp_path)


def test_two_writers_of_one_archive(tmp_path, tensors):
    with new_archive(tmp_path / "a.nf4dq", REQUEST) as archive:
        archive.add("x", torch.ones(3))
        with pytest.raises(OutputError, match="another process is writing"):
            write(tmp_path / "a.nf4dq", tensors)
    assert list(Archive(tmp_path / "a.nf4dq").directory.tensors) == ["x"]


def test_slices_are_refused_and_new_folders_made(tmp_path):
    packed = hb.quantize(torch.randn(4, 40))
    with pytest.raises(CheckpointError, match="part is a slice that begins inside a block"):
        write(tmp_path / "new" / "a.nf4dq", {"part": packed[1:]})
    write(tmp_path / "new" / "a.nf4dq", {"embed": packed[:2]})
    assert Archive(tmp_path / "new" / "a.nf4dq").tensor("embed").same_bytes(packed[:2])


def test_output_places(tmp_path, monkeypatch):
    (tmp_path / "folder.nf4dq").mkdir()
    (tmp_path / "file").write_text("x")
    for path, words in {
        tmp_path / "a.bin": "does not end in",
        tmp_path / "folder.nf4dq": "is a folder",
        tmp_path / "file" / "a.nf4dq": "is a file",
    }.items():
        with pytest.raises(OutputError, match=words):
            archive_writer.check_output_archive(path)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(OutputError, match="no permission"):
        archive_writer.check_output_archive(tmp_path / "a.nf4dq")


def test_a_file_that_others_may_read(tmp_path, tensors):
    mask = os.umask(0o022)
    try:
        write(tmp_path / "a.nf4dq", tensors)
    finally:
        os.umask(mask)
    assert (tmp_path / "a.nf4dq").stat().st_mode & 0o777 == 0o644


def test_compression_without_zstandard(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with (
        pytest.raises(
            RequestError, match=r"needs zstandard, which is not installed; pip install 'halfbyte\[archive\]'"
        ),
        new_archive(tmp_path / "a.nf4dq", {}, compress=True),
    ):
        pass
    assert not left(tmp_path)


def test_what_does_not_shrink_is_stored_as_it_is():
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    noise = torch.randint(0, 256, (100_000,), dtype=torch.uint8).numpy().data
    assert archive_codec.compress(noise) is None
    assert archive_codec.compress(memoryview(bytes(1_000_000))) is None  # readers refuse what expands so much
    assert archive_codec.compress(memoryview(b"")) is None
