"""The fake engine as processes (a planner, its ranks) over a shared store: `python -m` and this module's name.

It reads what to answer as lines of JSON on stdin, answers on stdout, and checks every byte after every step. On demand
it stops itself (SIGSTOP) at a given point. It never says goodbye to its store.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.engine.link import SharedSource
from kvkeep.engine.scheduler.planner import PlannerOptions
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.model import FakeModel, GroupShape
from kvkeep.testing.fake_engine.rank_process import RankProcess, StoppingTransfer, stop_here
from kvkeep.testing.fake_engine.request import EngineShape
from kvkeep.wire.client import Call, Client

RANKS = 2
SHAPE = EngineShape(groups=(GroupShape(4, layers=2),), ranks=RANKS, num_blocks=64, budget_tokens=16, verify_every=1)
OPTIONS = PlannerOptions(deadline_s=0.5, patience_s=0.05)
CHUNK_NBYTES = SHAPE.ranks * 2 * 4096
LIMIT_S = 60.0
PHASES = ("planner reserve", "planner commit", "planner fetch", "planner release")
POINTS = (*PHASES, *(f"rank{rank} {verb}" for rank in range(RANKS) for verb in ("gather", "scatter")))


class Ask(msgspec.Struct, frozen=True):
    """One request: at the point `stop` of POINTS a process stops itself; `forget`: only a store can help."""

    name: str
    prompt: tuple[int, ...]
    generate: int = 2
    stop: str = ""
    forget: bool = True


class Told(msgspec.Struct, frozen=True):
    """What became of it: all its tokens, how many of them came from the store, how long it took."""

    tokens: list[int]
    external: int
    took_s: float


class StartedEngine(msgspec.Struct, frozen=True):
    """The engine is ready; the pids of its ranks."""

    ranks: list[int]


def right_tokens(ask: Ask) -> list[int]:
    """What a request must be answered with, by recomputation."""
    model = FakeModel(SHAPE.groups, SHAPE.ranks, 1)
    tokens = list(ask.prompt)
    for _ in range(ask.generate):
        tokens.append(int(model.expected(0, tuple(tokens))[0, 0, 0, -1]) % SHAPE.vocabulary)
    return tokens


class EngineProcess:
    """Our end: starts the engine over the store at `path`. Its processes end with it, the ranks a moment later."""

    def __init__(self, path: str, environ: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "kvkeep.testing.fake_engine.engine_process", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **(environ or {})},
        )
        self._unread = b""
        self.ranks: list[int] = []

    def start(self) -> None:
        """Waits until it is ready; EOFError if it ends before."""
        self.ranks = msgspec.json.decode(self._line(LIMIT_S), type=StartedEngine).ranks

    def pid_of(self, point: str) -> int:
        """The process that stops at a point."""
        return self.process.pid if point.startswith("planner") else self.ranks[int(point[4])]

    def ask(self, ask: Ask) -> None:
        """Sends a request; `answer` waits for what becomes of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(ask) + b"\n")

    def answer(self, limit_s: float = LIMIT_S) -> Told:
        """The answer to the oldest request; TimeoutError past the limit, EOFError if the engine has ended."""
        return msgspec.json.decode(self._line(limit_s), type=Told)

    def await_stop(self, point: str, limit_s: float = LIMIT_S) -> int:
        """Waits until the process of this point is stopped, and gives its pid."""
        pid, end_s = self.pid_of(point), time.monotonic() + limit_s
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert self.process.poll() is None, f"the engine ended ({self.process.returncode}) before {point}"
            assert time.monotonic() < end_s, f"{point} was not reached"
        return pid

    def end(self) -> int:
        """Ends the engine without a word to its store, stopped processes too; its exit status."""
        for pid in (self.process.pid, *self.ranks):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(LIMIT_S)
        self.process.stdout.close()
        return status

    def _line(self, limit_s: float) -> bytes:
        assert self.process.stdout is not None
        end_s = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end_s - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {limit_s} s")
            data = self.process.stdout.read(1 << 16)
            if not data:
                raise EOFError(f"the engine ended with {self.process.wait(LIMIT_S)}")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return line


# ---- the engine's side -----------------------------------------------------------------------------------------


def stopping(flags: memoryview) -> None:
    """Puts a stop around what this process's planner says to its store: before a commit and a release, else after."""

    def around(name: str, verb: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def stopped(client: Client, *arguments: Any) -> Call | None:
            if before:
                stop_here(flags, PHASES.index(name))
            call: Call | None = verb(client, *arguments)
            if not before:
                stop_here(flags, PHASES.index(name))
            return call

        return stopped

    for name in PHASES:
        verb = name.split()[1]
        setattr(Client, verb, around(name, getattr(Client, verb), verb in ("commit", "release")))


def answered(engine: FakeEngine, ask: Ask) -> Told:
    """Runs one request to its end."""
    if ask.forget:
        engine.blocks.forget(list(engine.blocks.cached.values()))
    before, began_s = engine.external_tokens, time.monotonic()
    request = engine.add(ask.name, ask.prompt, ask.generate)
    engine.run(max_steps=1_000_000)
    del engine.requests[ask.name]
    return Told(request.tokens, engine.external_tokens - before, time.monotonic() - began_s)


def main(arguments: Sequence[str]) -> int:
    """Is the engine; ends with the end of file of its stdin."""
    flags = memoryview(mmap.mmap(-1, mmap.PAGESIZE))  # before the ranks are forked: they share it
    stopping(flags)
    engine = FakeEngine(
        SHAPE,
        SharedSource(arguments[0], wait_s=30.0),
        OPTIONS,
        lambda rank, inner: StoppingTransfer(inner, flags, len(PHASES) + 2 * rank),
        rank=lambda rank, transfer, door, _: RankProcess(rank, transfer, door),
    )
    print(msgspec.json.encode(StartedEngine(engine.pids[1:])).decode(), flush=True)
    for line in sys.stdin:
        ask = msgspec.json.decode(line, type=Ask)
        if ask.stop:
            flags[POINTS.index(ask.stop)] = 1
        print(msgspec.json.encode(answered(engine, ask)).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main(sys.argv[1:]))
