"""Where the real models and data lie, and how results are printed; shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.device import this_machine


def assets() -> Path:
    """The folder of real models and data (HALFBYTE_ASSETS, or ../shared/assets beside the repository)."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
    folder = Path(os.environ.get("HALFBYTE_ASSETS", default))
    if not folder.is_dir():
        sys.exit("benchmark skipped: HALFBYTE_ASSETS names no folder with the real models and data")
    return folder


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def finish(name: str, result: dict[str, Any]) -> None:
    """Print the machine, the versions and, as the last line, the result as JSON."""
    libraries = {library: version(library) for library in ("halfbyte", "torch", "transformers", "peft")}
    here = this_machine()
    machine = (
        f"{here.cores} cores of {here.processor}, {here.memory / 2**30:.0f} GiB, Python {platform.python_version()}"
    )
    print(f"\n{date.today()} · {machine} · " + ", ".join(f"{key} {value}" for key, value in libraries.items()))
    print(
        json.dumps({"benchmark": name, "date": str(date.today()), "machine": machine, "versions": libraries, **result})
    )
