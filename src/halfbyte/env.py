"""The environment variables halfbyte looks at. No other module reads or writes `os.environ`.

| variable | values | effect |
|---|---|---|
| `HALFBYTE_KERNELS` | `auto`, `cpu`, `triton`, `reference` | which kernels the ops run on; `auto` is the default |
| `HALFBYTE_CPU_ISA` | `auto`, `generic`, `avx2`, `avx512`, `avx512bf16`, `amx`, `neon`, `neonbf16` | the CPU kernels |
| `HALFBYTE_CACHE` | a folder | where tokenized data is kept; `halfbyte` in `XDG_CACHE_HOME` or `~/.cache` by default |
| `HALFBYTE_CACHE_GB` | a number, 20 by default | what the cache may take; what was used longest ago goes first |
| `WORLD_SIZE`, `RANK` | numbers | set by torchrun: how many processes train one model, and which one this is |
| `HF_HUB_OFFLINE` | `1` | set by halfbyte before a local path is opened: nothing reaches for a network |
| `OMP_WAIT_POLICY` | `PASSIVE` | set by the command line unless it is set: idle threads sleep, they do not spin |
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from halfbyte.errors import RequestError, nearest

KERNEL_CHOICES = ("auto", "cpu", "triton", "reference")
CACHE_GB = 20
CPU_ISA_CHOICES = ("auto", "generic", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16")


def kernels() -> str:
    """The value of `HALFBYTE_KERNELS`.

    Raises:
        RequestError: the variable holds something that is not offered.
    """
    return _choice("HALFBYTE_KERNELS", KERNEL_CHOICES)


def cpu_isa() -> str:
    """The value of `HALFBYTE_CPU_ISA`: "auto" or an instruction set.

    Raises:
        RequestError: the variable holds something that is not offered.
    """
    return _choice("HALFBYTE_CPU_ISA", CPU_ISA_CHOICES)


def cache_folder() -> Path:
    """Where things are kept that can be made again; deleting it costs time and nothing else."""
    named = os.environ.get("HALFBYTE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"


def cache_limit() -> int:
    """Bytes that the cache may take.

    Raises:
        RequestError: `HALFBYTE_CACHE_GB` is not a number, or below 0.
    """
    named = os.environ.get("HALFBYTE_CACHE_GB", "").strip() or str(CACHE_GB)
    try:
        limit = float(named)
    except ValueError:
        limit = -1
    if not 0 <= limit < float("inf"):
        raise RequestError(
            f"HALFBYTE_CACHE_GB={named!r} is not a number of gigabytes; give one, {CACHE_GB} for example."
        )
    return int(limit * 1e9)


def _choice(variable: str, choices: tuple[str, ...]) -> str:
    choice = os.environ.get(variable, "auto").strip().lower() or "auto"
    if choice not in choices:
        raise RequestError(f"{variable}={choice!r} is not offered; {nearest(choice, choices)}.")
    return choice


def world_size() -> int:
    """How many processes a launcher (torchrun, accelerate) has started for one run; 1 without one."""
    named = os.environ.get("WORLD_SIZE", "")
    return max(int(named), 1) if named.isdecimal() else 1


def rank() -> int:
    """Which of a launcher's processes this is, from 0."""
    named = os.environ.get("RANK", "")
    return int(named) if named.isdecimal() and world_size() > 1 else 0


def missing_from_launcher() -> list[str]:
    """What processes that are to find each other need and the environment lacks."""
    return [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]


def go_offline() -> None:
    """Keep the Hugging Face libraries off the network for the rest of this process.

    Called before a local path is opened. The variables are read when those libraries are imported, so a hub client
    that is already loaded is switched through its own constants.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def quiet_libraries() -> None:
    """Defaults that keep a terminal readable: no advice, no progress bars in a log file. What the user has set wins."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def patient_threads() -> None:
    """Let OpenMP's idle threads sleep. It has to be said before torch is imported; the user's own setting wins.

    By default they spin while they wait for the next parallel loop. On a machine that runs something else besides, the
    thread that has the work then waits for the one that spins: the quickstart took nine times as long beside one other
    process on two cores (docs/log.md, 2026-11-21).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
