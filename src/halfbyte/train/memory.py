"""How much memory a run took, counted over what the process held before it began.

On CUDA the allocator keeps an exact peak. On the CPU there is the resident set; the kernel keeps its high-water mark
(`ru_maxrss`), which cannot be reset, so a run reports the mark minus the resident set at its start. That is the true
peak of the run wherever the process had not been larger before, which is so for the command line: the libraries are
imported, then the measurement starts, then the model is loaded.
"""

from __future__ import annotations

import sys

import psutil
import torch


class PeakMemory:
    """Starts counting when it is made."""

    def __init__(self) -> None:
        self._idle = psutil.Process().memory_info().rss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def host(self) -> int:
        """Peak resident bytes of the process over its size at the start."""
        return max(0, _high_water_mark() - self._idle)

    def device(self) -> int | None:
        """Peak bytes that tensors took on the GPU; None without one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def memory_now() -> int:
    """Bytes that tensors take on the GPU at this moment, or the whole process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int:
    """The largest resident set that this process has had, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
