"""What holds for every test: where asserts are rewritten, and which tests may start processes.

pytest rewrites the asserts of test modules, and here those of what tests stand on, so that they hold under `python -O`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HELPERS = [file for file in HERE.rglob("*.py") if not file.name.startswith(("test_", "conftest"))]
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
MAY_START = ("process", "slow", "vllm", "gpu")

pytest.register_assert_rewrite(
    "kvkeep.testing", *(".".join(("tests", *file.relative_to(HERE).with_suffix("").parts)) for file in HELPERS)
)


@pytest.fixture(scope="session")
def processes() -> list[str]:
    """The starts of processes since the session began, as Python's audit events report them."""
    started: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            started.append(f"{event} {arguments[0] if arguments else ''}")

    sys.addaudithook(note)
    return started


@pytest.fixture(autouse=True)
def marked_if_it_starts_a_process(request: pytest.FixtureRequest, processes: list[str]) -> Iterator[None]:
    """Fail a test that starts a process and has no mark that keeps it out of `make check`."""
    before = len(processes)
    yield
    if len(processes) > before and not any(request.node.get_closest_marker(mark) for mark in MAY_START):
        pytest.fail(f"it starts a process ({processes[before]}): mark it with @pytest.mark.process", pytrace=False)
