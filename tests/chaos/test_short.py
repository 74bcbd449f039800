"""Some seconds of chaos and some of hostile clients; `make chaos` and `make fuzz` are the long runs, which are timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("chaos.py", "--minutes=0.15", "--seed=3"), ("fuzz.py", "--frames=20000", "--seed=3")]
)
def test_a_short_run_ends_well(command: tuple[str, ...]) -> None:
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
