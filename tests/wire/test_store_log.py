"""The lines of a store process, beside those of the engine that started it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.config import Config


@pytest.mark.process
def test_each_line_says_who_how_bad_and_when(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    command = [
        sys.executable,
        "-m",
        "kvkeep.store",
        f"--socket={tmp_path / 'store'}",
        f"--options={Config(pool_size=1 << 20).json()}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.terminate()
        process.communicate(timeout=20)
    assert re.fullmatch(rf"kvkeep store {process.pid} INFO \d\d-\d\d \d\d:\d\d:\d\d pool of .*\n", line), line
