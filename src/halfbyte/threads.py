"""torch's threads: the OpenMP runtime that holds them, and computing without them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, or None where there is none with GNU's interface.

    A second runtime would be a second pool of threads, fighting the first for the cores. So only what is mapped into
    this process is asked: torch's own copy on Linux lies in its folder under a name of its own.
    """
    for path in _mapped_runtimes():
        try:
            runtime = ctypes.CDLL(path)
            runtime.GOMP_parallel, runtime.omp_get_max_threads, runtime.omp_set_num_threads  # noqa: B018
        except (OSError, AttributeError):
            continue
        return runtime
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operations and the kernels take one thread when they are called by this one.

    A sum is then made in an order that does not depend on the machine, and nobody is woken for work of microseconds:
    OpenMP's threads wait for the next such by spinning, up to milliseconds, at the cost of whoever else has work.
    `torch.set_num_threads` would change it for every thread. Without OpenMP (see `openmp`) nothing changes.
    """
    runtime = openmp()
    before = torch.get_num_threads()  # also lets torch set this thread up, which it would else do later
    if runtime is None or before == 1:
        yield
        return
    runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        runtime.omp_set_num_threads(before)


def _mapped_runtimes() -> list[str]:
    """Paths of OpenMP runtimes, torch's own folder first."""
    names = ("libgomp", "libiomp5", "libomp")
    paths = [p for p in sorted((Path(torch.__file__).parent / "lib").glob("lib*")) if p.name.startswith(names)]
    if sys.platform == "linux":
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        mapped = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
        found = sorted(path for path in mapped if Path(path).name.startswith(names))
        inside = [str(path.resolve()) for path in paths]
        return sorted(found, key=lambda path: path not in inside)
    return [str(path) for path in paths]
