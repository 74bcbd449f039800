"""One engine's reset over a shared store with a disk: it takes nothing from the others, and leaves nothing on the disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kvkeep.config import Config, Disk
from kvkeep.engine.link import SharedSource
from kvkeep.engine.scheduler.planner import PlannerOptions
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.model import GroupShape
from kvkeep.testing.fake_engine.request import EngineShape
from kvkeep.wire.messages import Stats

pytestmark = pytest.mark.process

LIMIT_S = 20.0
SHAPE = EngineShape(groups=(GroupShape(4, layers=2),), num_blocks=64)
OURS, THEIRS, NEW = range(100, 140), range(200, 240), range(300, 340)
WHOLE = 39  # tokens; all that a store may give of them
OWN = b"an epoch of mine"


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[str]:
    """A store process with a disk."""
    path = tmp_path / "run" / "store"
    disk = Disk(path=(str(tmp_path / "disk"),), size=16 << 20, min_free=0)
    (tmp_path / "disk").mkdir()
    options = Config(pool_size=8 << 20, log_level="error", tiers=[disk])
    command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={options.json()}"]
    with subprocess.Popen(command) as store:
        yield str(path)
        store.terminate()


@contextmanager
def engine(path: str) -> Iterator[FakeEngine]:
    source = SharedSource(path, wait_s=LIMIT_S)
    with closing(FakeEngine(SHAPE, source, PlannerOptions(LIMIT_S, LIMIT_S))) as made:
        until(made, "disk_scanned", 1)
        yield made


def given(made: FakeEngine, prompt: range) -> int:
    """How many tokens of this prompt the store gives; what is absent is stored."""
    before = made.external_tokens
    made.add(f"{prompt} {len(made.requests)}", prompt)
    made.run()
    made.blocks.forget(list(made.blocks.cached.values()))
    return made.external_tokens - before


def figures(made: FakeEngine) -> dict[str, int]:
    client = made.link.client
    assert client is not None
    stats = client.wait(client.stats(check=True), LIMIT_S)
    assert isinstance(stats, Stats)
    assert stats.problem == ""
    return stats.figures


def until(made: FakeEngine, name: str, value: int) -> dict[str, int]:
    """The figures once one of them has this value; each question is a turn of the store's loop."""
    end_s = time.monotonic() + LIMIT_S
    while (found := figures(made)).get(name, 0) != value:
        assert time.monotonic() < end_s, found
    return found


def test_a_reset_takes_nothing_from_others_and_a_restart_finds_what_was_there(socket_path: str) -> None:
    with engine(socket_path) as other:
        with engine(socket_path) as ours:
            given(ours, OURS)
            given(other, THEIRS)
            assert given(ours, OURS) == given(other, OURS) == given(other, THEIRS) == WHOLE
            until(other, "disk_stored", 10)
            ours.planner.reset(OWN, "")
            assert given(ours, OURS) == 0, "what old weights made"
            assert given(ours, NEW) == 0
            assert given(ours, NEW) == given(ours, OURS) == WHOLE, "it keeps what it makes from here on"
            assert given(other, OURS) == given(other, THEIRS) == WHOLE
            assert given(other, NEW) == 0
            until(other, "disk_stored", 15)
            assert figures(other)["chunks"] == 25
        with engine(socket_path) as again:
            assert given(again, OURS) == given(again, THEIRS) == given(again, NEW) == WHOLE
        assert figures(other)["chunks"] == 15, "nobody could find what it had kept for itself"
        found = until(other, "disk_flush_waiting", 0)
        assert (found["disk_stored"], found["disk_records"]) == (15, 15)
