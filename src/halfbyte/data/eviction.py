"""A cache that stays below a size: what was used longest ago goes first, and nothing that a process uses.

Each entry is a folder, and in it stands a file that says so (the marker). Whoever opens an entry holds a shared lock on
its marker until its process ends, however it ends; an entry is deleted only under an exclusive lock. The marker's time
of change is when the entry was last used. Where there are no such locks (Windows) the system itself refuses to move the
folder of a file that is mapped.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUILDING, DOOMED = ".building-", ".doomed-"  # how the names of folders begin that are no entries yet, or no longer
FORGOTTEN = 86_400.0  # seconds after which such a folder is what a killed process left

_held: dict[Path, IO[bytes]] = {}  # markers; open, and so locked, as long as this process lives


def hold(marker: Path) -> bool:
    """Keep an entry from being deleted while this process lives, and note that it was used.

    Returns:
        Whether there is such an entry.
    """
    if marker not in _held or not marker.exists():
        try:
            file = marker.open("rb")
        except OSError:
            return False
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
        if not marker.exists():  # it was deleted while this process waited for the lock
            file.close()
            return False
        _held[marker] = file
    with suppress(OSError):  # a cache that this user may only read
        os.utime(marker)
    return True


def evict(cache: Path, marker: str, limit: int) -> None:
    """Delete the entries that were used longest ago until the others take up to `limit` bytes.

    Args:
        cache: the folder of the entries.
        marker: the name of the file that each has.
        limit: bytes; entries in use count, and stay.
    """
    for leftover in (*cache.glob(f"{BUILDING}*"), *cache.glob(f"{DOOMED}*")):
        if time.time() - max(_changed(path) for path in (leftover, *leftover.glob("*"))) > FORGOTTEN:
            shutil.rmtree(leftover, ignore_errors=True)
    entries = sorted(cache.glob(f"*/{marker}"), key=_changed)
    sizes = {entry: sum(_size(path) for path in entry.parent.iterdir()) for entry in entries}
    excess = sum(sizes.values()) - limit
    for entry in entries:
        if excess <= 0:
            break
        if entry not in _held and _delete(entry):
            excess -= sizes[entry]


def _delete(marker: Path) -> bool:
    """Delete an entry unless somebody uses it."""
    doomed = marker.parent.with_name(f"{DOOMED}{marker.parent.name}-{os.getpid()}")
    try:
        with ExitStack() as lock:
            if fcntl is not None:  # elsewhere an open file would keep its folder from being renamed
                fcntl.flock(lock.enter_context(marker.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            marker.parent.rename(doomed)
    except OSError:  # in use, or another process was faster
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _changed(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
