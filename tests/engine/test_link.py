"""The planner's line to its store over real processes: killed, stopped, found again; and the worker at its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch

from kvkeep.config import Config
from kvkeep.core.key import none_hash
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.link import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    SILENCE_LIMIT_S,
    Link,
    PrivateSource,
    SharedSource,
    StoreSource,
)
from kvkeep.engine.plan import LoadOp, StepPlan, StoreOp
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.errors import BlockError, KVKeepError, StoreGone
from kvkeep.store.server.listening import listen
from kvkeep.telemetry import Figures
from kvkeep.testing.doubles.store_thread import ThreadSource, shared_store
from kvkeep.testing.doubles.transfers import ManualClock
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.client import Client
from kvkeep.wire.messages import VERSION, Hello, Stats
from kvkeep.wire.pool_socket import PoolDoor
from kvkeep.wire.start import Child, join_shared

CHUNK, ROOM = 4096, 8
OPTIONS = Config(pool_size=ROOM * CHUNK, log_level="error")
LIMIT_S = 20.0


def hello(resumes: int) -> Hello:
    return Hello(
        name="link",
        namespace=b"n" * 16,
        identity="",
        chunk_nbytes=CHUNK,
        holders=[os.getpid()],
        verify_every=0,
        resumes=resumes,
    )


@dataclass
class Watched:
    """A source that remembers the sockets it gave out, so that a test can wait for what comes without sleeping."""

    inner: StoreSource
    socks: list[socket.socket] = field(default_factory=list)
    fails: bool = False
    tries: int = 0
    children: list[Child | None] = field(default_factory=list)

    def connect(self) -> socket.socket:
        self.tries += 1
        if self.fails:
            raise StoreGone("on purpose")
        self.socks.append(self.inner.connect())
        self.children.append(getattr(self.inner, "_child", None))
        return self.socks[-1]

    def end(self, wait: bool) -> None:
        self.inner.end(wait)

    @property
    def outlived(self) -> bool:
        return self.inner.outlived

    def patience_s(self) -> float | None:
        return self.inner.patience_s()

    def reap(self) -> None:
        """Waits for the children that were killed: `PrivateSource.end` drops them a moment before they are dead."""
        for child in self.children:
            if child is not None:
                child.process.wait(LIMIT_S)

    def until_it_speaks(self) -> None:
        ready, _, _ = select.select([self.socks[-1]], [], [], LIMIT_S)
        assert ready, "the store says nothing"


@dataclass
class Line:
    """A link over a source, its clock, and the doors of its workers."""

    source: Watched
    doors: list[str] = field(default_factory=list)
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.link = Link(self.source, hello, self.doors, self.clock)

    def started(self) -> Client:
        """Starts; the clock stands still, so it is the socket that ends the wait."""
        self.link.clock = lambda: 0.0
        self.link.start(LIMIT_S)
        self.link.clock = self.clock
        assert self.link.client is not None
        return self.link.client

    def found_again(self) -> Client:
        """The pause is over, a new store is asked for, and its welcome is here."""
        self.clock.advance(FIRST_PAUSE_S + 0.1)
        assert self.link.live(idle=True) is None, "the welcome needs a second look"
        self.source.until_it_speaks()
        client = self.link.live(idle=False)
        assert client is not None
        return client


@pytest.fixture
def line() -> Iterator[Line]:
    """A line to a store in a process of its own."""
    made = Line(Watched(PrivateSource(OPTIONS)))
    yield made
    made.link.close()
    made.source.reap()


@pytest.fixture
def thread_line() -> Iterator[Line]:
    """A line to a store in a thread."""
    made = Line(Watched(ThreadSource(ROOM * CHUNK)))
    yield made
    made.link.close()


def kill(client: Client) -> None:
    """kill -9 of the client's store; the end of file is here when this returns."""
    os.kill(client.welcome.pid, signal.SIGKILL)
    select.select([client.sock], [], [], LIMIT_S)


# ---- lost and found --------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_killed_store_is_noticed_at_the_next_look_and_found_again_after_a_pause(line: Line) -> None:
    first = line.started()
    assert line.link.live(idle=True) is first
    kill(first)
    first.pump()
    assert not first.alive
    assert line.link.live(idle=True) is None
    line.clock.advance(FIRST_PAUSE_S - 0.1)
    assert line.link.live(idle=True) is None
    assert len(line.source.socks) == 1, "tried again before its pause was over"
    line.clock.advance(0.2)
    assert line.link.live(idle=False) is None
    assert len(line.source.socks) == 1, "tried again while a step was under way"
    second = line.found_again()
    assert second.welcome.boot != first.welcome.boot
    assert second.welcome.pid != first.welcome.pid
    assert isinstance(second.wait(second.stats(check=True), LIMIT_S), Stats)


def test_a_reset_between_our_hello_and_its_welcome_counts(thread_line: Line) -> None:
    client = thread_line.started()
    client.lose("on purpose")
    assert thread_line.link.live(idle=True) is None
    thread_line.clock.advance(FIRST_PAUSE_S + 0.1)
    assert thread_line.link.live(idle=True) is None, "the hello is out"
    fresh = b"r" * 16
    thread_line.link.begin_anew(fresh, "")
    thread_line.link.hello = lambda resumes: msgspec.structs.replace(hello(resumes), namespace=fresh)
    thread_line.source.until_it_speaks()
    client = thread_line.link.live(idle=True)
    assert client is not None
    assert isinstance(client.wait(client.stats(), LIMIT_S), Stats)  # all that was sent before has been read
    assert isinstance(thread_line.source.inner, ThreadSource)
    (session,) = thread_line.source.inner.running.store.sessions.values()
    assert session.namespace == fresh, "the weights of before the reset would be found"
    assert not session.lasting


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_success(thread_line: Line) -> None:
    client = thread_line.started()
    thread_line.source.fails = True
    client.lose("on purpose")
    assert thread_line.link.live(idle=True) is None
    pauses = []
    for _ in range(8):
        since, tries = thread_line.clock(), thread_line.source.tries
        while thread_line.source.tries == tries:
            thread_line.clock.advance(0.5)
            assert thread_line.link.live(idle=True) is None
        pauses.append(thread_line.clock() - since)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    thread_line.source.fails = False
    thread_line.clock.advance(LONGEST_PAUSE_S)
    assert thread_line.link.live(idle=True) is None
    thread_line.source.until_it_speaks()
    client = thread_line.link.live(idle=True)
    assert client is not None
    client.lose("once more")
    assert thread_line.link.live(idle=True) is None
    assert thread_line.found_again() is not client


def test_a_start_that_fails_says_so(thread_line: Line) -> None:
    thread_line.source.fails = True
    with pytest.raises(StoreGone, match="on purpose"):
        thread_line.link.start(LIMIT_S)
    assert thread_line.link.client is None


def test_a_shared_store_is_joined_and_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "store"
    with shared_store(path, OPTIONS) as running:
        lines = [Line(Watched(SharedSource(str(path)))) for _ in range(2)]
        clients = [line.started() for line in lines]
        assert {client.welcome.boot for client in clients} == {running.server.boot}
        for line in lines:
            line.link.close()


# ---- a worker and its pools ------------------------------------------------------------------------------------


@dataclass
class Rank:
    """A worker over a cache of nine blocks of one byte a token."""

    door: PoolDoor = field(default_factory=PoolDoor)
    cache: torch.Tensor = field(default_factory=lambda: torch.arange(9 * 4, dtype=torch.uint8).reshape(9, 4))

    def __post_init__(self) -> None:
        transfer = ReferenceTransfer([GroupCaches({"l": self.cache}, 9, 4, 0)], 8)
        self.worker = Worker(0, CpuCopies(transfer), MappedPool(self.door))

    def stores(self, boot: bytes, step: int, *block_ids: int) -> bool:
        self.worker.start_stores(StepPlan(step, boot, (0,), stores=(StoreOp(0, (Blocks(0, 0, block_ids),), True),)))
        (done,) = self.worker.results.take_report().stores
        assert done.step == step
        return 0 in done.sums

    def loads(self, boot: bytes, step: int, *block_ids: int) -> bool:
        op = LoadOp(boot, "r", 0, 0, blocks=(Blocks(0, 0, block_ids),))
        plan = StepPlan(step, b"", (0,), loads=(op,))
        self.worker.start_loads(plan)
        self.worker.start_stores(plan)
        (done,) = self.worker.results.take_report().loads
        assert self.worker.results.take_failed_blocks() == (set(block_ids) if done.failed else set())
        return not done.failed


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.worker.close()


@pytest.mark.process
def test_a_worker_of_a_new_boot_neither_loads_nor_stores_for_the_old_one(line: Line, rank: Rank) -> None:
    beside = Rank()
    line.doors += [rank.door.path, beside.door.path]
    assert not rank.stores(b"any boot at all.", 1, 1, 2), "there is no pool yet"
    assert not rank.loads(b"any boot at all.", 2, 3, 4)
    first = line.started()
    old = first.welcome.boot
    assert rank.stores(old, 3, 1, 2)
    assert rank.loads(old, 4, 3, 4)
    assert rank.cache[3:5].tolist() == rank.cache[1:3].tolist()
    kill(first)
    assert rank.stores(old, 5, 1, 2), "a pool whose store is dead is written to by nobody else"
    first.pump()
    assert line.link.live(idle=True) is None
    second = line.found_again()
    new = second.welcome.boot
    assert rank.stores(new, 6, 5, 6)
    before = rank.cache.clone()
    assert not rank.stores(old, 7, 1, 2)
    assert not rank.loads(old, 8, 7, 8)
    assert torch.equal(rank.cache, before)
    assert beside.loads(new, 9, 7, 8)
    assert beside.cache[7:9].tolist() == rank.cache[5:7].tolist(), "what was stored for the new store has changed"
    assert rank.loads(new, 9, 7, 8)
    beside.worker.close()


def test_stores_that_come_and_go_while_no_step_copies_fill_no_door(thread_line: Line, rank: Rank) -> None:
    thread_line.doors.append(rank.door.path)
    client = thread_line.started()
    for _ in range(10):
        client.lose("on purpose")
        assert thread_line.link.live(idle=True) is None
        client = thread_line.found_again()
        end_s = time.monotonic() + LIMIT_S
        while not rank.worker.pool.has(client.welcome.boot):
            assert time.monotonic() < end_s, "it is not taken before a step asks for it"
    assert rank.stores(client.welcome.boot, 1, 1, 2)


def test_a_plan_with_wrong_blocks_is_refused_before_anything_is_copied(thread_line: Line, rank: Rank) -> None:
    thread_line.doors.append(rank.door.path)
    boot = thread_line.started().welcome.boot
    assert rank.stores(boot, 1, 1, 2)
    before = rank.cache.clone()
    ops = [LoadOp(boot, "r", 0, 0, blocks=(Blocks(0, 0, ids),)) for ids in ((3, 4), (5, 3))]
    with pytest.raises(BlockError, match="named twice"):
        rank.worker.start_loads(StepPlan(2, boot, (0,), loads=tuple(ops)))
    assert torch.equal(rank.cache, before)


# ---- a shared store that is not there yet ----------------------------------------------------------------------


def shared_line(path: Path, wait_s: float = 0.0) -> Line:
    return Line(Watched(SharedSource(str(path), wait_s)))


def test_an_engine_starts_without_its_shared_store_and_finds_it_later(tmp_path: Path) -> None:
    path = tmp_path / "run" / "store"
    line = shared_line(path)
    line.link.start(LIMIT_S)
    assert line.link.client is None
    assert line.link.live(idle=True) is None
    assert line.source.tries == 1, "it is not asked for again before the pause is over"
    with shared_store(path, OPTIONS):
        assert line.found_again().alive
        line.link.close()


@pytest.mark.parametrize("comes", [True, False])
def test_a_start_waits_for_its_shared_store_as_long_as_it_was_told(tmp_path: Path, comes: bool) -> None:
    path = tmp_path / "run" / "store"
    line = shared_line(path, wait_s=1.0)
    with contextlib.ExitStack() as stores:

        def pause(limit_s: float) -> None:
            line.clock.advance(limit_s)
            if comes and line.source.tries == 3:
                line.link.clock = lambda: 0.0
                stores.enter_context(shared_store(path, OPTIONS))

        line.link.pause = pause
        line.link.start(LIMIT_S)
        assert (line.link.client is not None) == comes
        assert line.source.tries == (4 if comes else 6)
        assert line.clock() == pytest.approx(0.6 if comes else 1.0)
        line.link.close()


def test_a_shared_store_of_another_version_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "store"
    line = shared_line(path)
    line.link.hello = lambda resumes: msgspec.structs.replace(hello(resumes), version=VERSION + 1)
    with shared_store(path, OPTIONS):
        line.link.start(LIMIT_S)
        assert line.link.client is None


def test_a_stopped_shared_store_with_a_full_backlog_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "store"
    tmp_path.chmod(0o700)
    with listen(path) as listener, contextlib.ExitStack() as clients:
        listener.listen(0)
        clients.enter_context(join_shared(str(path), LIMIT_S))
        with pytest.raises(StoreGone, match="no store answers"):
            SharedSource(str(path)).connect()


# ---- stopped ---------------------------------------------------------------------------------------------------


@dataclass
class Asking:
    """A planner over a line, with a short patience, and a note of every wait."""

    line: Line
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        client = self.line.started()
        wait = client.wait

        def waiting(call: object, limit_s: float) -> object:
            self.waits.append(limit_s)
            return wait(call, limit_s)  # type: ignore[arg-type]

        client.wait = waiting  # type: ignore[assignment,method-assign]
        layout = ChunkLayout((SHARD,))
        options = PlannerOptions(deadline_s=0.5, patience_s=0.002)
        self.planner = Planner(self.line.link, layout, options, Figures(), self.line.clock)

    def match(self, name: str) -> int | None:
        return self.planner.match(Request(name, range(20), 20, none_hash()), 0)

    def admit(self, name: str) -> None:
        self.planner.admit(Request(name, range(20), 20, none_hash()), 0, lambda: [[1, 2, 3]])


SHARD = ReferenceTransfer([GroupCaches({"l": torch.zeros(9, 4, dtype=torch.uint8)}, 9, 4, 0)], 8).shard


@pytest.mark.process
def test_a_stopped_store_costs_one_deadline_in_short_waits_and_is_used_again_when_it_goes_on(line: Line) -> None:
    asking = Asking(line)
    client = line.link.client
    assert client is not None
    os.kill(client.welcome.pid, signal.SIGSTOP)
    assert [asking.match("r") for _ in range(5)] == [None] * 5
    line.clock.advance(0.6)
    assert asking.match("r") == 0
    assert asking.match("other") == 0
    for name in ("r", "other"):
        asking.admit(name)
    assert asking.planner.figures.misses() == {"deadline": 2}
    assert set(asking.waits) == {0.002}
    line.clock.advance(SILENCE_LIMIT_S - 1)
    assert line.link.live(idle=True) is None
    os.kill(client.welcome.pid, signal.SIGCONT)
    select.select([client.sock], [], [], LIMIT_S)
    while line.link.live(idle=True) is None:
        assert client.alive
    while (given := asking.match("again")) is None:
        pass
    assert given == 0
    asking.admit("again")
    assert asking.planner.figures.misses()["not_stored"] == 1
    assert asking.planner.figures.count("store_losses") == 0


@pytest.mark.process
def test_a_store_that_stays_silent_is_given_up_killed_and_replaced(line: Line) -> None:
    asking = Asking(line)
    client = line.link.client
    assert client is not None
    stopped = client.welcome.pid
    os.kill(stopped, signal.SIGSTOP)
    pidfd = os.pidfd_open(stopped)
    assert asking.match("r") is None
    line.clock.advance(0.6)
    assert asking.match("r") == 0
    line.clock.advance(SILENCE_LIMIT_S + 1)
    assert asking.match("other") == 0
    assert not client.alive
    assert "no answer for 30 s" in client.why_gone
    assert asking.match("other") == 0
    ready, _, _ = select.select([pidfd], [], [], LIMIT_S)
    os.close(pidfd)
    assert ready, "the store that was given up is still there"
    assert line.found_again().welcome.pid != stopped
    asking.admit("other")
    assert asking.planner.figures.misses()["store_gone"] == 1
    for name in ("r", "other"):
        asking.planner.end(name)


# ---- what must not be left behind ------------------------------------------------------------------------------


def quiet_end(make: Callable[[Link], None]) -> tuple[Link, socket.socket]:
    """A link over a peer that never welcomes, after `make` has been done with it; our end of the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    @dataclass
    class Silent:
        outlived = True

        def connect(self) -> socket.socket:
            return ours

        def end(self, wait: bool) -> None:
            """Like that of a shared store: it closes nothing."""

        def patience_s(self) -> float | None:
            return 0.0

    clock = ManualClock(1.0)
    link = Link(Silent(), hello, [], clock)
    with theirs:
        assert link.live(idle=True) is None
        make(link)
    return link, ours


@pytest.mark.parametrize("how", ["no welcome", "closed"])
def test_a_connection_without_a_welcome_is_closed_when_it_is_given_up(how: str) -> None:
    def give_up(link: Link) -> None:
        if how == "closed":
            link.close()
            return
        assert isinstance(link.clock, ManualClock)
        link.clock.advance(LONGEST_PAUSE_S + 2)
        assert link.live(idle=True) is None

    _, ours = quiet_end(give_up)
    with ours:
        assert ours.fileno() < 0


def test_a_client_whose_pool_cannot_be_handed_over_is_dropped(thread_line: Line) -> None:
    thread_line.doors.append("/nowhere/at/all")
    with pytest.raises(KVKeepError, match="did not take the pool"):
        thread_line.started()
    with thread_line.source.socks[-1] as ours:
        assert ours.fileno() < 0


@pytest.mark.process
def test_a_private_store_that_was_started_ends_with_its_link(line: Line) -> None:
    pid = line.started().welcome.pid
    line.link.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
