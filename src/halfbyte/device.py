"""What this machine is: processor, cores, memory, GPU. Facts only; which kernels run is `kernels.registry`'s choice."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


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
