"""`save_model`: a model folder that is either whole or not there.

The folder is written beside its place and renamed when every byte is on disk, so a full disk or a kill leaves nothing
that could be taken for a model. Which keys are written is `quantizer.py`'s business: bitsandbytes' layout where that
library can read the result.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.errors import OutputError


def save_model(model: Any, path: str | Path, tokenizer: Any = None, *, max_shard_size: str = "5GB") -> Path:
    """Write a model (and its tokenizer) as a folder of safetensors shards and configs.

    Args:
        model: a transformers model, quantized or not.
        path: a folder that does not exist or is empty.
        tokenizer: saved beside it, if given.
        max_shard_size: transformers' notation.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty or cannot be written, or the disk is full; nothing is left behind.
    """
    with new_folder(path) as aside:
        model.save_pretrained(aside, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    return Path(path)


def check_output_folder(path: str | Path) -> Path:
    """Check, before any work is done, that a new folder can be made at `path`.

    Raises:
        OutputError: it exists and is not empty, is a file, or its parent cannot be written.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty; name a new folder or empty it yourself")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a new folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"there is no permission to write into {parent}")
    return folder


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    What a process that was killed left beside `path` is thrown away by the next one.

    Raises:
        OutputError: see `check_output_folder`; also when another process is writing it, or the disk fills up inside the
            block.
    """
    folder = check_output_folder(path).absolute()
    made = _make_parents(folder.parent)
    aside, lock = None, None
    try:
        aside, lock = _begin(folder)
        yield aside
        mask = umask()
        for file in aside.rglob("*"):
            if file.is_file():
                # safetensors makes what only its owner may open; a model is shared like any other file.
                file.chmod(0o666 & ~mask)
                sync(file)
        aside.chmod(0o777 & ~mask)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except BaseException as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        raise as_output_error(error, folder) from None
    finally:
        if lock is not None:
            os.close(lock)
    sync(folder.parent)


def _begin(folder: Path) -> tuple[Path, int]:
    """An empty folder beside `folder`, and the lock on it; one that a killed process left is taken over and emptied."""
    aside = folder.with_name(f".{folder.name}.partial")
    aside.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(aside, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock may have finished in between: then this folder has its name, and is not ours.
        ours = aside.stat().st_ino == os.fstat(lock).st_ino
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        os.close(lock)
        raise OutputError(f"another process is writing {folder}; let it finish or name another folder")
    for left in aside.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    return aside, lock


def as_output_error(error: BaseException, folder: Path) -> BaseException:
    """Disk-full and permission errors as sentences; safetensors wraps the system's error in text of its own."""
    text = str(error)
    if (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "No space left" in text
        or "os error 28" in text
    ):
        return OutputError(f"the disk that holds {folder} is full; nothing was kept of it")
    if isinstance(error, PermissionError):
        return OutputError(f"there is no permission to write {error.filename or folder}")
    return error


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns those made, innermost first, so that a failure can take them away again."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir()
    return missing


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
