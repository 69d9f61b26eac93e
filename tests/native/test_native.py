"""The test program of the C interface (native_test.cpp), built for this machine and, under qemu, for 64-bit ARM.

Its digest is over all results that have to be equal to the bit, so it has to be the same on both: the plain C++ kernels
are compared with the reference on this machine (tests/kernels/test_cpu.py), and with that on ARM too.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from halfbyte.kernels.cpu.library import ISAS

ROOT = Path(__file__).resolve().parents[2]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
CASES = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))),
        reason="the test program needs CMake and a C++ compiler",
    ),
]
needs_emulation = pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"64-bit ARM needs {CROSS_COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


def finished(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def built(folder: Path, *options: str) -> Path:
    finished("cmake", "-S", ROOT, "-B", folder, "-DHB_TESTS=ON", *options)
    finished("cmake", "--build", folder, "--parallel", "2")
    return folder / "native_test"


def report(output: str) -> tuple[set[str], str, str]:
    """What the program says: the instruction sets that ran, the best one, and the digest."""
    found = re.search(r"instruction sets ([\d ]+); best (\d+)\n(\d+) cases.* digest (\w{16})\n", output)
    assert found and int(found[3]) == CASES, output
    return {ISAS[int(number)] for number in found[1].split()}, ISAS[int(found[2])], found[4]


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def arm64(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("native_arm64"), *ARM64)


def test_every_instruction_set_of_this_machine(host):
    ran, best, _ = report(finished(host, "--cases", str(CASES)))
    assert "generic" in ran and best in ran
    if platform.machine() in ("aarch64", "arm64"):
        assert "neon" in ran


@needs_emulation
@pytest.mark.parametrize(
    ("processor", "expected"), [("cortex-a53", ["generic", "neon"]), ("max", ["generic", "neon", "neonbf16"])]
)
def test_neon_and_the_same_bits_as_on_this_machine(host, arm64, processor, expected):
    """An ARMv8.0 core, which faults on anything newer, and all that the emulator knows."""
    ran, best, digest = report(finished(EMULATOR, "-cpu", processor, arm64, "--cases", str(CASES)))
    assert ran == set(expected) and best == expected[-1]
    assert digest == report(finished(host, "--cases", str(CASES)))[2]


def test_a_wrong_option_is_refused(host):
    done = subprocess.run([host, "--seed"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
