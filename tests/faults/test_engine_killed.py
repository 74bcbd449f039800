"""An engine that is killed in the middle of its work costs a shared store nothing that lasts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.memory.region import Region
from kvkeep.testing.doubles.store_thread import shared_store
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

pytestmark = pytest.mark.process

CHUNK, ROOM = 4096, 4
LIMIT_S = 20.0
# holds: chunks 0 and 1 committed, chunk 0 pinned twice, chunks 2 and 3 in the making and half written
ENGINE = """
import os, sys
from kvkeep.memory.region import Region
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining
from kvkeep.wire.start import join_shared
hello = m.Hello(name="engine", namespace=b"n" * 16, identity="", chunk_nbytes=4096, holders=[os.getpid()])
client = Joining(join_shared(sys.argv[1], 20.0), hello).wait(20.0)
digests = [bytes([n]) * 32 for n in range(4)]
region = Region.attach(os.dup(client.pool_fd))
first = client.wait(client.reserve(digests[:2]), 20.0)
for n, offset in enumerate(first.offsets):
    region.array[offset : offset + 4096] = n + 1
committed = client.wait(client.commit(first.lease, [0, 1], [b"a", b"b"]), 20.0)
client.release(first.lease)
pins = [client.wait(client.fetch(digests[:1]), 20.0) for _ in range(2)]
assert committed.done == [True, True] and all(pin.lease for pin in pins)  # python -O makes no assertions
making = client.wait(client.reserve(digests[2:]), 20.0)
region.array[making.offsets[0] : making.offsets[0] + 100] = 99
print("ready", flush=True)
sys.stdin.read()
"""


def figures(client: Client) -> dict[str, int]:
    got = client.wait(client.stats(check=True), LIMIT_S)
    assert isinstance(got, m.Stats), client.why_gone
    assert got.problem == ""
    return got.figures


def until(client: Client, right: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Asks until the figures are right; each question is a round trip through the store's loop."""
    for _ in range(100_000):
        if right(now := figures(client)):
            return now
    raise AssertionError(now)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    where = tmp_path / "run" / "store"
    with shared_store(where, Config(pool_size=ROOM * CHUNK, max_pinned_share=1.0)):
        yield str(where)


@pytest.fixture
def survivor(path: str) -> Iterator[Client]:
    hello = m.Hello(name="survivor", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()])
    client = Joining(join_shared(path, LIMIT_S), hello).wait(LIMIT_S)
    yield client
    client.close()


def started(path: str) -> subprocess.Popen[bytes]:
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"ready\n"
    return engine


def test_what_a_killed_engine_held_comes_back_and_what_it_committed_stays(path: str, survivor: Client):
    with started(path) as engine:
        held = figures(survivor)
        assert (held["pinned_nbytes"], held["writing_nbytes"], held["sessions"]) == (CHUNK, 2 * CHUNK, 2)
        full = survivor.wait(survivor.reserve([bytes([n]) * 32 for n in (2, 7)]), LIMIT_S)
        assert isinstance(full, m.Granted)
        assert full.offsets[0] == m.BUSY, "its keys in the making are its own while it lives"
        survivor.release(full.lease)
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.wait(LIMIT_S) == -signal.SIGKILL
    now = until(survivor, lambda now: now["sessions"] == 1 and now["quarantined_nbytes"] == 0)
    assert now["pinned_nbytes"] == now["writing_nbytes"] == now["dead_nbytes"] == 0

    with Region.attach(os.dup(survivor.pool_fd)) as region:
        matched = survivor.wait(survivor.fetch([bytes([n]) * 32 for n in range(4)]), LIMIT_S)
        assert isinstance(matched, m.Matched)
        kept = len(matched.offsets)
        assert kept == now["chunks"] > 0, "the half-written chunks are no hits"
        for n, offset in enumerate(matched.offsets):
            assert (region.array[offset : offset + CHUNK] == n + 1).all()
    survivor.release(matched.lease)
    again = survivor.wait(survivor.reserve([bytes([n]) * 32 for n in range(4, 4 + ROOM)]), LIMIT_S)
    assert isinstance(again, m.Granted)
    assert sorted(again.offsets) == [n * CHUNK for n in range(ROOM)], "every byte can be lent again"
    survivor.release(again.lease)


def test_engines_that_are_killed_one_after_the_other_leave_nothing(path: str, survivor: Client):
    for _ in range(2):
        with started(path) as engine:
            engine.kill()
            engine.wait(LIMIT_S)
        now = until(survivor, lambda now: now["sessions"] == 1 and now["quarantined_nbytes"] == 0)
        assert now["used_nbytes"] == now["committed_nbytes"]
        cleared = survivor.wait(survivor.clear(), LIMIT_S)
        assert isinstance(cleared, m.Cleared)
        assert cleared.count == 2
    assert figures(survivor)["used_nbytes"] == 0
