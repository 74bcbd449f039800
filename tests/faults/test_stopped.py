"""Processes of an engine that are stopped at every point of both paths, or end there, under a shared store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.engine.link import SharedSource
from kvkeep.memory.region import Region
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.engine_process import (
    CHUNK_NBYTES,
    OPTIONS,
    POINTS,
    SHAPE,
    Ask,
    EngineProcess,
    right_tokens,
)
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

pytestmark = pytest.mark.slow

ROOM = 16
LIMIT_S = 30.0
LEASE_TIME_S = 0.001  # a writer that is stopped is overdue at once


@dataclass
class Store:
    """A shared store's process."""

    path: Path
    process: subprocess.Popen[str]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)

    def client(self) -> Client:
        hello = m.Hello(name="test", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK_NBYTES, holders=[])
        return Joining(join_shared(str(self.path), LIMIT_S), hello).wait(LIMIT_S)

    def figures(self, right: Callable[[dict[str, int]], bool] = lambda _: True) -> dict[str, int]:
        """The figures once they are right; each question is a round trip through the store's loop."""
        client, end_s = self.client(), time.monotonic() + LIMIT_S
        while True:
            answer = client.wait(client.stats(check=True), LIMIT_S)
            assert isinstance(answer, m.Stats), client.why_gone
            assert answer.problem == ""
            if right(answer.figures):
                client.close()
                return answer.figures
            assert time.monotonic() < end_s, answer.figures


def at_rest(now: dict[str, int]) -> bool:
    return not any(now[f"{name}_nbytes"] for name in ("pinned", "writing", "dead", "quarantined"))


def started(path: Path) -> Store:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    options = Config(pool_size=ROOM * CHUNK_NBYTES, max_pinned_share=1.0, lease_time_s=LEASE_TIME_S)
    command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={options.json()}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "pool of" in process.stderr.readline()
    return Store(path, process)


@contextmanager
def ended(store: Store) -> Iterator[Store]:
    try:
        yield store
    finally:
        store.kill()
        assert store.process.stderr is not None
        store.process.stderr.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with ended(started(tmp_path / "run" / "store")) as store:
        yield store


@contextmanager
def engine(store: Store) -> Iterator[EngineProcess]:
    one = EngineProcess(str(store.path))
    one.start()
    try:
        yield one
    finally:
        one.end()


@contextmanager
def survivor(store: Store) -> Iterator[FakeEngine]:
    """An engine in this process over the same store."""
    one = FakeEngine(SHAPE, SharedSource(str(store.path)), OPTIONS)
    try:
        yield one
    finally:
        one.close()


def run(other: FakeEngine, name: str, prompt: tuple[int, ...]) -> None:
    """Its answer is right, whatever it was given."""
    other.blocks.forget(list(other.blocks.cached.values()))
    ask = Ask(name, prompt)
    request = other.add(name, prompt, ask.generate)
    other.run()
    assert request.tokens == right_tokens(ask)


def check_pool(store: Store, other: FakeEngine) -> int:
    client = store.client()
    pool = client.take_pool()
    os.close(pool.life)
    with Region.attach(pool.fd) as region:
        checked = other.check_pool(region.array)
    client.close()
    return checked


def test_a_process_that_is_stopped_anywhere_and_goes_on_harms_nobody(store: Store) -> None:
    with engine(store) as slow, survivor(store) as other:
        for number, point in enumerate(POINTS):
            prompt = tuple(range(number * 100, number * 100 + 30))
            if point.split()[1] in ("scatter", "release"):
                slow.ask(Ask("first", prompt))
                assert slow.answer().tokens == right_tokens(Ask("first", prompt))
            slow.ask(Ask(point, prompt, stop=point))
            pid = slow.await_stop(point)
            held = store.figures()
            began_s = time.monotonic()
            run(other, f"same {number}", prompt)
            for filler in range(3):  # more than the pool has room for: everything that may go goes
                run(other, f"{number} {filler}", tuple(range(10_000 * (filler + 1), 10_000 * (filler + 1) + 49)))
            assert time.monotonic() - began_s < LIMIT_S / 3, "it waits for a process that is stopped"
            now = store.figures()
            still = now["pinned_nbytes"] + now["writing_nbytes"] + now["dead_nbytes"]
            assert still >= held["pinned_nbytes"] or point == "planner release", "age alone freed memory"
            os.kill(pid, signal.SIGCONT)
            told = slow.answer()
            assert told.tokens == right_tokens(Ask(point, prompt)), point
            assert check_pool(store, other) > 0
            store.figures(at_rest)
        assert store.figures()["revoked"] > 0, "nobody ever had to take a key over"


def test_a_late_gather_writes_into_no_memory_of_the_next_boot(store: Store) -> None:
    prompt = tuple(range(30))
    with engine(store) as slow:
        slow.ask(Ask("late", prompt, stop="rank0 gather"))
        pid = slow.await_stop("rank0 gather")
        store.kill()
        with ended(started(store.path)) as second, survivor(second) as other:
            run(other, "same", prompt)
            run(other, "more", tuple(range(500, 530)))
            os.kill(pid, signal.SIGCONT)
            assert slow.answer().tokens == right_tokens(Ask("late", prompt))
            assert check_pool(second, other) == 6
            end_s = time.monotonic() + LIMIT_S
            external = 0
            while not external:  # it goes on without a store until it has found the new one
                assert time.monotonic() < end_s
                slow.ask(Ask("again", prompt))
                external = slow.answer().external
            second.figures(at_rest)


@pytest.mark.parametrize("point", POINTS)
def test_an_engine_that_dies_anywhere_leaks_nothing(store: Store, point: str) -> None:
    prompt = tuple(range(30))
    with survivor(store) as other:
        one = EngineProcess(str(store.path))
        one.start()
        if point.split()[1] in ("scatter", "release"):
            one.ask(Ask("first", prompt))
            one.answer()
        one.ask(Ask("killed", prompt, stop=point))
        pid = one.await_stop(point)
        os.kill(pid, signal.SIGKILL)
        if point.startswith("rank"):
            with pytest.raises(EOFError, match="ended with 3"):
                one.answer()
        one.end()
        store.figures(lambda now: at_rest(now) and now["sessions"] == 2 and now["lingering"] == 0)
        run(other, "same", prompt)
        assert check_pool(store, other) > 0
        store.figures(at_rest)


def test_ranks_that_outlive_their_planner_keep_its_memory_until_they_are_gone(store: Store) -> None:
    one = EngineProcess(str(store.path))
    one.start()
    one.ask(Ask("orphans", tuple(range(30)), stop="rank1 gather"))
    stopped = one.await_stop("rank1 gather")
    one.process.kill()
    one.process.wait(LIMIT_S)
    now = store.figures(lambda now: now["lingering"] == 1)
    assert now["quarantined_nbytes"] > 0
    assert now["writing_nbytes"] == 0, "their keys are free for others"
    os.kill(stopped, signal.SIGKILL)  # the other rank ends with its planner's socket
    store.figures(lambda now: at_rest(now) and now["lingering"] == 0)
    one.end()


PARENT = """
import json, sys
from kvkeep.testing.fake_engine.engine_process import Ask, EngineProcess
one = EngineProcess(sys.argv[1])
one.start()
one.ask(Ask("held", tuple(range(30)), stop="rank0 gather"))
print(json.dumps([one.process.pid, one.await_stop("rank0 gather")]), flush=True)
sys.stdin.read()
"""


def test_an_engine_whose_api_process_was_killed_costs_nothing_once_it_is_gone(store: Store) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(store.path)], **pipes) as parent, survivor(store) as other:
        assert parent.stdout is not None
        _, rank = json.loads(parent.stdout.readline())
        parent.kill()
        parent.wait(LIMIT_S)
        assert store.figures()["sessions"] == 3, "the engine lives on, and so does its session"
        run(other, "same", tuple(range(30)))
        assert check_pool(store, other) > 0, "what an orphan has in the making holds nobody up"
        os.kill(rank, signal.SIGCONT)  # it finishes its step, then finds the end of its parent's pipe
        store.figures(lambda now: at_rest(now) and now["sessions"] == 2 and now["lingering"] == 0)
