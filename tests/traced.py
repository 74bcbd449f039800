"""Which functions of kvkeep run, in which order, while chunks go from an engine down to disk and, in a new store, back up.

`traced(folder)` runs a fake engine here and a real store in a process of its own, each with Python's profile hook on, and
joins what both saw by the machine's clock. As a program, `traced.py store FILE ...` is that store: SIGUSR1 writes what it
saw since the last time to FILE.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_S = 20.0
CHUNKS = 8
Calls = list[tuple[int, str, str]]
"""When a function began (CLOCK_MONOTONIC, ns), its module, its name."""


class Recorder:
    """The profile hook: notes each call of a function of kvkeep that is not part of the test kit."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            module = frame.f_globals.get("__name__") or ""
            if module.startswith("kvkeep.") and not module.startswith("kvkeep.testing"):
                self.calls.append((time.monotonic_ns(), module.removeprefix("kvkeep."), frame.f_code.co_qualname))

    def take(self) -> Calls:
        """What was noted since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def start(self) -> None:
        """Note calls of this thread and of those that start from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> None:
        """Note nothing more here."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def store(file: Path, arguments: list[str]) -> int:
    """Be a store whose calls SIGUSR1 writes to `file`."""
    recorder = Recorder()

    def write(*_: object) -> None:
        part = file.with_suffix(".part")
        part.write_text("".join(f"{began} {module} {name}\n" for began, module, name in recorder.take()))
        part.rename(file)

    signal.signal(signal.SIGUSR1, write)
    recorder.start()
    from kvkeep.store.__main__ import main

    return main(arguments)


def traced(folder: Path) -> dict[str, Calls]:
    """The calls of a prompt's way down ("store") and, from the disk into a new store's pool, up ("retrieve")."""
    return {name: list(_traced(folder, name)) for name in ("store", "retrieve")}


def _traced(folder: Path, name: str) -> Iterator[tuple[int, str, str]]:
    from kvkeep.engine.link import SharedSource
    from kvkeep.engine.scheduler.planner import PlannerOptions
    from kvkeep.testing.fake_engine.engine import FakeEngine
    from kvkeep.testing.fake_engine.model import GroupShape
    from kvkeep.testing.fake_engine.request import EngineShape

    shape = EngineShape(groups=(GroupShape(4, layers=3),), num_blocks=128, budget_tokens=256, layerwise=False)
    with _running(folder, name) as (process, path):
        engine = FakeEngine(shape, SharedSource(path, LIMIT_S), PlannerOptions(deadline_s=LIMIT_S, patience_s=LIMIT_S))
        client = engine.link.client
        assert client is not None

        def disk(figure: str) -> int:
            rows = client.wait(client.stats(), LIMIT_S).rows  # type: ignore[union-attr]
            return next((row.value for row in rows if (row.tier, row.name) == ("disk", figure)), 0)

        _until(lambda: disk("scanned") > 0)
        _written(process, folder / "calls")
        recorder = Recorder()
        recorder.start()
        engine.add("r", tuple((7 * index + index * index) % 8 for index in range(8 * CHUNKS + 1)), 1)
        engine.run()
        recorder.stop()
        assert engine.external_tokens == (8 * CHUNKS if name == "retrieve" else 0)
        _until(lambda: name == "retrieve" or disk("stored") >= CHUNKS)
        lines = _written(process, folder / "calls").splitlines()
        engine.close()
    calls = [(int(began), module, function) for began, module, function in (line.split(" ", 2) for line in lines)]
    yield from sorted(calls + recorder.take())


@contextmanager
def _running(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    from kvkeep.config import Config, Disk

    path = folder / name / "store"
    path.parent.mkdir(mode=0o700)
    (folder / "disk").mkdir(mode=0o700, exist_ok=True)
    disk = Disk(path=(str(folder / "disk"),), size=16 << 20, min_free=0)
    options = Config(pool_size=4 << 20, tiers=(disk,), log_level="error").json()
    command = [sys.executable, __file__, "store", str(folder / "calls"), f"--socket={path}", f"--options={options}"]
    with subprocess.Popen(command) as process:
        try:
            yield process, str(path)
        finally:
            process.terminate()


def _written(process: subprocess.Popen[bytes], file: Path) -> str:
    file.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    _until(file.exists)
    return file.read_text()


def _until(true: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end


if __name__ == "__main__":
    sys.exit(store(Path(sys.argv[2]), sys.argv[3:]))
