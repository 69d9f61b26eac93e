"""`save_model`: a model folder that is either whole or not there.

The folder is written beside its place and renamed when every byte is on disk, so a full disk or a kill leaves nothing
that could be taken for a model. Which keys are written is `quantizer.py`'s business: bitsandbytes' layout where that
library can read the result.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.errors import OutputError

# What the name of a folder that is being written ends in.
_ASIDE = ".partial"


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
    check_parent(folder)
    return folder


def check_parent(path: Path) -> None:
    """Check that something can be made at `path`: the nearest folder above it that exists can be written.

    Raises:
        OutputError: it cannot, or it is a file.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {path} cannot be written")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"there is no permission to write into {parent}")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    What a killed run has left beside `path` is taken away first.

    Raises:
        OutputError: see `check_output_folder`; also when the disk fills up inside the block.
    """
    folder = check_output_folder(path).absolute()
    made = make_parents(folder.parent)
    aside, lock = None, -1
    try:
        _remove_leftovers(folder)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_ASIDE, dir=folder.parent))
        lock = _locked(aside)
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
        if lock >= 0:
            os.close(lock)
    sync(folder.parent)


def _remove_leftovers(folder: Path) -> None:
    """Remove what runs that were killed have left beside a folder; those that still run hold a lock."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"[a-z0-9_]{8}" + re.escape(_ASIDE))
    for aside in folder.parent.iterdir():
        if pattern.fullmatch(aside.name) and aside.is_dir() and not aside.is_symlink():
            lock = _locked(aside)
            if lock >= 0:
                shutil.rmtree(aside, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int:
    """A descriptor that locks a folder, until it is closed or the process ends; -1 where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def check_output_file(path: str | Path) -> Path:
    """Check, before any work is done, that a new file can be made at `path`.

    Raises:
        OutputError: it exists, or its parent cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name a file")
    if file.exists():
        raise OutputError(f"{file} exists; name a new file or remove it yourself")
    check_parent(file)
    return file


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: see `check_output_file`; also when the disk fills up inside the block.
    """
    file = check_output_file(path).absolute()
    made = make_parents(file.parent)
    aside = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(descriptor)
        aside = Path(name)
        yield aside
        aside.chmod(0o666 & ~umask())  # mkstemp makes what only its owner may open
        sync(aside)
        aside.rename(file)
    except BaseException as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        for parent in made:
            parent.rmdir()
        raise as_output_error(error, file) from None
    sync(file.parent)


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


def make_parents(parent: Path) -> list[Path]:
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
