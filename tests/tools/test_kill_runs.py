"""A run that is killed at random moments comes to the same bits; `python tools/kill_runs.py --kills 100` does more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_killed_runs_are_resumed_to_the_same_bits(repository):
    """In a process of its own: a fork of one that runs tests would take their threads' locks with it."""
    command = [sys.executable, str(repository / "tools" / "kill_runs.py"), "--kills", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 8\n" in done.stdout
