"""Runs `kvkeep bench engine` in a child process: its cases need torch, which the command line does not import.

Knows nothing about the cases, which are in `kvkeep.bench.engine`, or about how rows are shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

from kvkeep.bench.rows import Row

WITHOUT_TORCH = "kvkeep bench engine needs torch, which is not installed here: pip install 'kvkeep[torch]'"
LIMIT_S = 900.0


def has_torch() -> bool:
    """Whether torch is installed, without importing it."""
    return find_spec("torch") is not None


def engine_rows(runs: int) -> list[Row]:
    """Every case, in a process of one thread; what it says of its progress goes to our standard error."""
    command = [sys.executable, "-m", "kvkeep.bench.engine", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=LIMIT_S)  # noqa: S603
    return [Row(**fields) for fields in json.loads(done.stdout)]
