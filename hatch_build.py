"""Builds the native CPU kernels (csrc/) when halfbyte is installed, and lets the install succeed when it cannot.

Hatchling calls this for wheels and for editable installs. The library goes beside the code that loads it,
src/halfbyte/kernels/cpu/. Without a compiler, or when compiling fails, a note with the reason and the remedy goes there
instead: halfbyte then runs on its reference implementation, and `halfbyte info` prints that note.

CMake comes from the machine, or from PyPI as a build dependency: only a C++ compiler has to be there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libhalfbyte_cpu.so"
NOTE = "not_built.txt"
FOLDER = Path("src", "halfbyte", "kernels", "cpu")
REMEDY = "install one (g++ 11 or clang++ 14 or later) and run `pip install --force-reinstall --no-deps halfbyte`"


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """The build hook; hatchling finds it by its base class."""

    def dependencies(self) -> list[str]:
        """CMake and a program for it to drive, where there is a compiler and they are not installed."""
        if not compiler():
            return []
        wanted = [] if shutil.which("cmake") else ["cmake>=3.18"]
        return wanted if shutil.which("ninja") or shutil.which("make") else [*wanted, "ninja"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and leave either the library or the note in the package."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / FOLDER
        problem = build(Path(self.root), folder / LIBRARY)
        if problem:
            (folder / LIBRARY).unlink(missing_ok=True)
            (folder / NOTE).write_text(problem + "\n", encoding="utf-8")
            self.app.display_warning(f"halfbyte's native kernels were not built: {problem}")
        else:
            (folder / NOTE).unlink(missing_ok=True)
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"] += [f"/{(FOLDER / name).as_posix()}" for name in (LIBRARY, NOTE)]


def compiler() -> str | None:
    """The C++ compiler to use: CXX if it is set, else the first that is installed."""
    chosen = os.environ.get("CXX")
    return chosen or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build(root: Path, target: Path) -> str:
    """Compile csrc/ to `target`. Returns "" or, on two lines, why there is none and what to do about it."""
    if sys.platform == "win32":
        return "the native kernels are not built on Windows yet\nuse WSL"
    if not compiler():
        return f"no C++ compiler was found when halfbyte was installed\n{REMEDY}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with tempfile.TemporaryDirectory() as scratch:
        steps = (
            ["cmake", "-S", str(root), "-B", scratch, "-DCMAKE_BUILD_TYPE=Release", *generator],
            ["cmake", "--build", scratch, "--parallel", str(os.cpu_count() or 1)],
        )
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, check=False)
            except OSError as error:
                reason = f"CMake could not be started when halfbyte was installed ({error})"
                return f"{reason}\ninstall CMake and {REMEDY[12:]}"
            if done.returncode:
                sys.stderr.write(done.stdout + done.stderr)
                return f"compiling failed when halfbyte was installed\n`pip install -v` shows why; {REMEDY}"
        # Moved into place whole: another process may have the old library mapped.
        fresh = target.with_suffix(".new")
        shutil.copyfile(Path(scratch) / LIBRARY, fresh)
        os.replace(fresh, target)
    return ""
