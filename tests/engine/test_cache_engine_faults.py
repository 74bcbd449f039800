"""`CacheEngine` when its store is killed, stopped or shared, and when several threads use it."""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvkeep.config import Config
from kvkeep.doors.library.cache_engine import CacheAccess, CacheEngine
from kvkeep.doors.library.open import Model, identity_of, open_cache
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.link import FIRST_PAUSE_S, PrivateSource, SharedSource
from kvkeep.errors import ConfigError, StoreGone
from kvkeep.testing.doubles.store_thread import shared_store
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.wire.frames import framed
from kvkeep.wire.messages import Welcome, encoded

from .library import CHUNK, MODEL, Library, flash_attention, group, library, mla

HERE = list(range(1, 37))
THERE = list(range(79, 43, -1))
TOKENS = range(32)
LAYERS = 3
POOL_NBYTES = 16 << 20
LIMIT_S = 10.0


@contextmanager
def private(clock: ManualClock, deadline_s: float = 20.0) -> Iterator[tuple[Library, PrivateSource]]:
    """An engine over a store process of its own."""
    groups = [group(flash_attention, LAYERS)]
    source = PrivateSource(Config(pool_size=POOL_NBYTES, log_level="error"))
    config = Config(deadline_s=deadline_s, chunk_tokens=CHUNK)
    with CacheEngine(
        CacheAccess(CpuCopies(ReferenceTransfer(groups, CHUNK)), clock=clock),
        identity_of(MODEL, groups, CHUNK),
        source,
        config,
    ) as one:
        lib = Library(one, groups, source)
        lib.fill(1)
        yield lib, source


def kill(source: PrivateSource) -> None:
    """Kills the store, which is ours, and waits until it is gone."""
    child = source._child
    assert child is not None
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait(10)


def until(holds: Callable[[], bool]) -> None:
    """Asks until it holds; every question looks on at what the store has said."""
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end, "it never came"


def found_again(lib: Library, source: PrivateSource, clock: ManualClock) -> None:
    """After the pause the next call starts a store, and one after its welcome has it."""
    clock.advance(FIRST_PAUSE_S + 0.1)
    assert lib.engine.lookup(TOKENS) == 0
    assert source._child is not None
    ready, _, _ = select.select([source._child.sock], [], [], 20)
    assert ready, "the new store says nothing"
    assert lib.engine.store(TOKENS, [HERE]) == 32
    assert lib.engine.lookup(TOKENS) == 32


@pytest.mark.process
def test_a_killed_store_is_a_miss_half_way_and_is_found_again():
    clock = ManualClock()
    with private(clock) as (lib, source):
        assert lib.engine.store(TOKENS, [HERE]) == 32
        assert lib.engine.lookup(TOKENS, "pin") == 32
        before = lib.pages()
        retrieving = lib.engine.retrieve_layer(TOKENS, [THERE])
        storing = lib.engine.store_layer(range(100, 132), [HERE])
        got = [next(retrieving), next(retrieving), next(storing)]
        kill(source)
        rest = list(retrieving)
        assert len(got) - 1 + len(rest) == LAYERS + 2
        assert rest[-1].all(), "what was lent is still what it was"
        assert lib.pages() == lib.after(before, [HERE[:8]], [THERE[:8]], rest[-1])
        assert len(list(storing)) == LAYERS, "and the first step"
        assert lib.engine.figures.count("stored_tokens") == 32, "nothing of it was made readable"
        assert (lib.engine.lookup(TOKENS), lib.engine.store(TOKENS, [HERE])) == (0, 0)
        assert not lib.engine.retrieve(TOKENS, [THERE]).any()
        assert len(list(lib.engine.retrieve_layer(TOKENS, [THERE]))) == LAYERS + 2
        assert len(list(lib.engine.store_layer(TOKENS, [HERE]))) == LAYERS + 1
        with pytest.raises(StoreGone):
            lib.engine.clear()
        found_again(lib, source, clock)
        mask = lib.engine.retrieve(TOKENS, [THERE])
        assert mask.all()
        assert lib.pages() == lib.after(before, [HERE[:8]], [THERE[:8]], mask)
        lib.settled()


@pytest.mark.process
def test_a_dead_store_leaves_no_memory_behind_in_a_program_that_makes_no_call():
    with private(ManualClock()) as (lib, source):
        lib.engine._store._mapped._late_s = 0.0
        pool = lib.engine._store._mapped._pool
        assert pool is not None
        kill(source)
        until(lambda: pool.wait(0.0))
        assert lib.engine.lookup(TOKENS) == 0


@pytest.mark.process
def test_a_store_that_stands_still_costs_a_deadline_and_no_more():
    with private(ManualClock(), deadline_s=0.15) as (lib, source):
        assert source._child is not None
        until(lambda: lib.engine.store(TOKENS, [HERE]) == 32 or lib.engine.lookup(TOKENS) == 32)  # or it came late
        os.kill(source._child.process.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert not lib.engine.retrieve(TOKENS, [THERE]).any()
            for _ in range(50):  # until it has caught up nobody asks it
                assert lib.engine.lookup(TOKENS) == 0
                assert len(list(lib.engine.retrieve_layer(TOKENS, [THERE]))) == LAYERS + 2
            assert time.monotonic() - start < 20 * 0.15
        finally:
            os.kill(source._child.process.pid, signal.SIGCONT)
        select.select([source._child.sock], [], [], 10)
        until(lambda: lib.engine.lookup(TOKENS) == 32)
        until(lambda: lib.engine.store_figures().get("pinned_nbytes") == 0)  # what came too late is given back


@dataclass
class Impostor:
    """A store whose pool is no sealed memory."""

    theirs: socket.socket | None = None
    outlived = False

    def connect(self) -> socket.socket:
        ours, self.theirs = socket.socketpair()
        welcome = Welcome(boot=b"b" * 16, session=1, pid=os.getpid(), pool_nbytes=4096)
        with tempfile.TemporaryFile() as file:
            file.truncate(4096)
            socket.send_fds(self.theirs, [framed(encoded(welcome))], [file.fileno()] * 2)
        return ours

    def end(self, wait: bool) -> None:
        if self.theirs is not None:
            self.theirs.close()

    def patience_s(self) -> float | None:
        return None


def test_a_pool_that_cannot_be_mapped_is_no_store(caplog: pytest.LogCaptureFixture):
    with library([group(mla, 1)], Impostor()) as lib:
        for _ in range(10):
            assert (lib.engine.lookup(TOKENS), lib.engine.store(TOKENS, [HERE])) == (0, 0)
            assert not lib.engine.retrieve(TOKENS, [THERE]).any()
        assert lib.engine.figures.misses() == {"store_gone": 10}
    said = [one.message for one in caplog.records if "not sealed" in one.message or "no memfd" in one.message]
    assert 0 < len(said) <= 4, "once, not with every verb"


def test_threads_of_one_engine_have_their_turns():
    with library([group(flash_attention, 2)]) as lib:
        lib.fill(5)
        before = lib.pages()
        wrong: list[str] = []
        tables = [([HERE[n * 4 : n * 4 + 4]], [THERE[n * 4 : n * 4 + 4]]) for n in range(4)]

        def work(number: int) -> None:
            here, there = tables[number]
            for turn in range(12):
                tokens = range(1000 * number + turn % 3, 1000 * number + turn % 3 + 16)
                pin = f"pin {number}" if turn % 2 else None
                if turn % 4 == 0:
                    lib.engine.store(tokens, here)
                elif len(list(lib.engine.store_layer(tokens, here))) != 3:
                    wrong.append(f"{number}: a store's steps")
                lib.engine.lookup(tokens, pin)
                *_, mask = lib.engine.retrieve_layer(tokens, there)
                if mask[:CHUNK].any() and lib.pages()[0][there[0][0]] != before[0][here[0][0]]:
                    wrong.append(f"{number}: bytes")
                lib.engine.unpin(f"pin {number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)
        assert not wrong
        for number, (here, there) in enumerate(tables):
            mask = lib.engine.retrieve(range(1000 * number, 1000 * number + 16), there)
            after = lib.pages()
            for place in range(int(mask.sum()) // 4):
                assert [one[there[0][place]] for one in after] == [one[here[0][place]] for one in before]
        lib.settled()


# ---- a shared store ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_engines_that_agree_share_chunks_and_others_do_not(folder: Path):
    groups = [group(mla, 2)]
    with shared_store(folder / "store", Config(pool_size=POOL_NBYTES)):
        config = Config(store=f"unix:{folder / 'store'}", chunk_tokens=CHUNK, deadline_s=20.0)
        with open_cache(groups, MODEL, config) as one:
            assert one.store(TOKENS, [HERE]) == 32
            for model, hits in [
                (MODEL, 32),
                (Model("test"), 0),  # weights that are not named are those of no other engine
                (Model("test", weights="same weights", ranks=2), 0),
                (Model("test", weights="same weights", rank=1), 0),
                (Model("test", weights="same weights", notes="scaled"), 0),
                (Model("test", weights="other weights"), 0),
            ]:
                with open_cache(groups, model, config) as two:
                    assert two.lookup(TOKENS) == hits, model
            with open_cache([group(flash_attention, 2)], MODEL, config) as other:
                assert other.lookup(TOKENS) == 0, "another layout"
            assert one.clear() == 4


def test_closed_with_a_generator_open_its_memory_is_lent_to_nobody(folder: Path):
    groups = [group(mla, 2)]
    with shared_store(folder / "store", Config(pool_size=POOL_NBYTES)) as running:
        transfer = ReferenceTransfer(groups, CHUNK)
        source = SharedSource(str(folder / "store"))
        config = Config(deadline_s=20.0)
        with CacheEngine(CacheAccess(CpuCopies(transfer)), identity_of(MODEL, groups, CHUNK), source, config) as one:
            lib = Library(one, groups, source)
            lib.fill(1)
            one.store(TOKENS, [HERE])
            before = lib.pages()
            retrieving = one.retrieve_layer(TOKENS, [THERE])
            assert next(retrieving) == 32
        with CacheEngine(CacheAccess(CpuCopies(transfer)), identity_of(MODEL, groups, CHUNK), source, config) as two:
            assert two.store_figures()["quarantined_nbytes"] == 4 * transfer.shard.nbytes
            assert two.clear() == 4
            region = running.region.array
            kept = region.copy()
            two.store(range(500, 500 + 64), [[1] * 16])
            *_, mask = retrieving
            assert mask.all()
            assert lib.pages() == lib.after(before, [HERE[:8]], [THERE[:8]], mask)
            assert not np.array_equal(region, kept), "something was stored meanwhile, elsewhere"


def test_a_lost_session_is_resumed_only_when_nothing_is_read_any_more(folder: Path):
    """Resuming is our word that nobody touches what the old session was lent: it would be lent to others."""
    groups, clock = [group(mla, 2)], ManualClock()
    with shared_store(folder / "store", Config(pool_size=POOL_NBYTES)):
        transfer = ReferenceTransfer(groups, CHUNK)
        source = SharedSource(str(folder / "store"))
        config = Config(deadline_s=20.0)
        with CacheEngine(
            CacheAccess(CpuCopies(transfer), clock=clock), identity_of(MODEL, groups, CHUNK), source, config
        ) as one:
            one.store(TOKENS, [HERE])
            one.lookup(TOKENS, "pin")
            retrieving = one.retrieve_layer(TOKENS, [THERE])
            next(retrieving)
            client = one._store._link.client
            assert client is not None
            client.lose("on purpose")
            for _ in range(3):
                assert one.lookup(TOKENS) == 0
                clock.advance(FIRST_PAUSE_S + 0.1)
            assert one._store._link._joining is None, "it joins again while a generator reads"
            assert list(retrieving)[-1].all()
            until(lambda: one.lookup(TOKENS) == 32)  # the pin of the old session holds nothing up
            assert one.store_figures()["pinned_nbytes"] == 0


def test_a_shared_store_that_is_not_there_is_no_failure(folder: Path):
    with open_cache([group(mla, 1)], MODEL, Config(store=f"unix:{folder / 'nothing'}")) as one:
        assert one.store(TOKENS, [HERE]) == 0
        assert one.lookup(TOKENS) == 0


def test_a_start_that_fails_says_why(folder: Path):
    with pytest.raises(ConfigError, match="hold no chunk of this model"):
        open_cache([group(mla, 1)], MODEL, Config(pool_size=4096))
