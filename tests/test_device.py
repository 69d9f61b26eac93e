"""How much memory a process may use, read from trees of files as systems write them."""

from __future__ import annotations

import resource

import pytest

from halfbyte.device import available_memory

MIB = 2**20
SECOND = "30 24 0:27 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
FIRST = (
    "30 24 0:27 {root} {mount} rw,nosuid - cgroup cgroup rw,memory\n31 24 0:28 / /elsewhere rw - cgroup cgroup rw,cpu\n"
)


@pytest.fixture
def proc(tmp_path):
    """/proc of a machine with 1,000 MiB available and no cgroups."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Total: 0\n")
    (folder / "self" / "status").write_text(f"Name:\tx\nRssAnon:\t{100 * 1024} kB\n")
    return folder


def group(folder, limit, used, files, *, first=False, high="max"):
    """A cgroup that holds `used` MiB, of which `files` are pages of files, in two lists."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "total_" if first else ""
    wanted = str(limit * MIB) if limit is not None else "9223372036854771712" if first else "max"
    (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(wanted + "\n")
    (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used * MIB}\n")
    lists = {"active": files // 4 * MIB, "inactive": (files - files // 4) * MIB}
    (folder / "memory.stat").write_text("".join(f"{prefix}{age}_file {count}\n" for age, count in lists.items()))
    if not first:
        (folder / "memory.high").write_text(f"{high}\n")


def mounted(proc, mount, text, path, root="/"):
    (proc / "self" / "cgroup").write_text(path)
    (proc / "self" / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + text.format(mount=mount, root=root)
    )


def test_without_cgroups_it_is_what_the_machine_has(proc):
    assert available_memory(proc) == 1000 * MIB


def test_nothing_is_known_where_nothing_is_said(tmp_path):
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize("first", [False, True])
def test_pages_of_files_are_available_and_the_rest_is_not(proc, tmp_path, first):
    mount = tmp_path / "groups"
    group(mount / "a" / "b", 500, 400, 250, first=first)
    group(mount / "a", None, 4000, 250, first=first)
    mounted(proc, mount, FIRST if first else SECOND, "3:cpu:/x\n2:memory:/a/b\n" if first else "0::/a/b\n")
    assert available_memory(proc) == 350 * MIB
    group(mount / "a", 600, 590, 300, first=first)  # a limit above counts, too, with what all of its groups hold
    assert available_memory(proc) == 310 * MIB
    group(mount / "a", 600, 590, 0, first=first)
    assert available_memory(proc) == 10 * MIB
    group(mount / "a", 600, 700, 0, first=first)  # over a limit that was lowered
    assert available_memory(proc) == 0


def test_a_soft_limit_that_slows_a_group_down_counts(proc, tmp_path):
    group(tmp_path / "groups", 500, 100, 0, high=200 * MIB)
    mounted(proc, tmp_path / "groups", SECOND, "0::/\n")
    assert available_memory(proc) == 100 * MIB


@pytest.mark.parametrize(("path", "root"), [("/", "/"), ("/docker/1234", "/"), ("/docker/1234", "/docker/1234")])
def test_in_a_container_the_mount_is_the_groups_own(proc, tmp_path, path, root):
    """With a namespace of its own, without one, and where the host's path is shown."""
    group(tmp_path / "groups", 500, 100, 40)
    mounted(proc, tmp_path / "groups", SECOND, f"0::{path}\n", root)
    assert available_memory(proc) == 440 * MIB


def test_both_versions_at_once(proc, tmp_path):
    """As systemd's hybrid mode has them: memory belongs to the first, and the second has no such files."""
    group(tmp_path / "memory" / "a", 300, 100, 0, first=True)
    (tmp_path / "unified" / "a").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/a\n0::/a\n")
    (proc / "self" / "mountinfo").write_text(
        SECOND.format(root="/", mount=tmp_path / "unified") + FIRST.format(root="/", mount=tmp_path / "memory")
    )
    assert available_memory(proc) == 200 * MIB


def test_a_limit_of_resident_pages_counts(proc, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (300 * MIB, resource.RLIM_INFINITY))
    assert available_memory(proc) == 200 * MIB


def test_this_machine_has_some():
    assert available_memory() is None or available_memory() > MIB
