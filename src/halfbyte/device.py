"""What this machine is: processor, cores, memory, GPU, and how much of its memory this process may use.

Facts only; which kernels run is `kernels.registry`'s choice.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # bytes; version 1 of cgroups writes a number that is larger where there is no limit


@dataclass(frozen=True)
class Machine:
    """A computer.

    Attributes:
        processor: its name, as the system gives it.
        cores: logical cores that this process may use.
        memory: bytes of main memory; 0 where the system does not say.
        capability: the widest instruction set that torch uses here ("AVX512", "AVX2", "DEFAULT", ...).
        gpus: name and bytes of memory of each CUDA device; empty without one.
        gpu_reason: why there is none; empty when there is.
    """

    processor: str
    cores: int
    memory: int
    capability: str
    gpus: tuple[tuple[str, int], ...]
    gpu_reason: str


def this_machine() -> Machine:
    """Look around. Imports torch."""
    import torch

    gpus = tuple(
        (torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory)
        for index in range(torch.cuda.device_count())
    )
    reason = "" if gpus else "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        capability=torch.backends.cpu.get_cpu_capability(),
        gpus=gpus,
        gpu_reason=reason,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 0


def available_memory(proc: Path = Path("/proc")) -> int | None:
    """Bytes that this process may use besides what programs hold for themselves now; None: the system does not say.

    Pages of files count as available, whoever reads them, since the system gives them back when it has to. It is the
    least of what the machine has, what the memory cgroups that the process is in (version 1 or 2, and all above them)
    leave it, and RLIMIT_RSS, which Linux does not enforce but batch systems do. RLIMIT_AS and RLIMIT_DATA are limits of
    addresses: a file that could be mapped under them may be in memory as a whole.
    """
    rooms: list[int] = []
    with suppress(OSError, ValueError, KeyError):
        rooms.append(1024 * int(_fields(proc / "meminfo")["MemAvailable:"]))
    with suppress(OSError, ValueError):
        for group, first in _memory_groups(proc):
            with suppress(OSError, ValueError, KeyError):
                rooms.append(_room(group, first))
    with suppress(OSError, ValueError, KeyError, ImportError):
        rooms.append(_room_of_limit(proc))
    least = min(rooms, default=_UNLIMITED)
    return None if least >= _UNLIMITED else max(least, 0)


def _fields(path: Path) -> dict[str, str]:
    """First word -> second word of each line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {line[0]: line[1] for line in lines if len(line) > 1}


def _memory_groups(proc: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the memory cgroups that this process is in, from its own upwards, and whether they are version 1."""
    own = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()]
    for line in (proc / "self" / "mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        first = kind == "cgroup"
        if kind not in ("cgroup", "cgroup2") or (first and "memory" not in options.split(",")):
            continue
        for _, controllers, path in own:
            if "memory" in controllers.split(",") if first else not controllers:
                # In a container the path may be the host's, of which only what is below `root` can be seen.
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                yield from ((Path(mount, *inside.parts[:depth]), first) for depth in range(len(inside.parts), -1, -1))


def _room(group: Path, first: bool) -> int:
    """What a cgroup's limit leaves to pages of files and to what is still to come."""
    names = ("memory.limit_in_bytes",) if first else ("memory.max", "memory.high")
    limits = [limit for name in names if (limit := (group / name).read_text(encoding="utf-8").strip()) != "max"]
    used = int((group / f"memory.{'usage_in_bytes' if first else 'current'}").read_text(encoding="utf-8"))
    counts = _fields(group / "memory.stat")
    files = sum(int(counts[f"{'total_' if first else ''}{age}_file"]) for age in ("active", "inactive"))
    return min(map(int, limits), default=sys.maxsize) - used + files


def _room_of_limit(proc: Path) -> int:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_RSS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return limit - 1024 * int(_fields(proc / "self" / "status")["RssAnon:"])
