"""Client and server over real sockets: the handshake, what may go wrong on either side, and whose fault it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.queue import lru
from kvkeep.errors import StoreGone, WireError
from kvkeep.memory.progress import region_nbytes
from kvkeep.memory.region import Region
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store
from kvkeep.telemetry import Miss
from kvkeep.testing.doubles.store_thread import RunningStore, ThreadSource, shared_store
from kvkeep.wire import messages as m
from kvkeep.wire.client import Answer, Call, Client, Joining
from kvkeep.wire.frames import FrameReader, framed
from kvkeep.wire.start import join_shared

CHUNK, ROOM = 4096, 8
OPTIONS = Config(pool_size=ROOM * CHUNK, max_pinned_share=1.0)
LIMIT_S = 20.0
HOLDER = "import sys; sys.stdin.read()"
CLIENT = """
import sys
from kvkeep.wire.client import Joining
from kvkeep.wire.messages import Hello
from kvkeep.wire.start import join_shared
holders = [int(pid) for pid in sys.argv[2:]]
hello = Hello(name="child", namespace=b"n" * 16, identity="", chunk_nbytes=4096, holders=holders)
client = Joining(join_shared(sys.argv[1], 10.0), hello).wait(10.0)
granted = client.wait(client.reserve([bytes([9]) * 32, bytes([8]) * 32]), 10.0)
client.wait(client.commit(granted.lease, [0], [b"sum"]), 10.0)
client.wait(client.fetch([bytes([9]) * 32]), 10.0)
print(client.welcome.session, flush=True)
sys.stdin.read()
"""


def hello(version: int = m.VERSION, holders: tuple[int, ...] = (), resumes: int = 0, nbytes: int = CHUNK) -> m.Hello:
    return m.Hello(
        version=version,
        name="test",
        namespace=b"n" * 16,
        identity="",
        chunk_nbytes=nbytes,
        holders=list(holders or (os.getpid(),)),
        verify_every=0,
        resumes=resumes,
    )


def digests(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in numbers]


def answer(client: Client, call: Call) -> Answer:
    got = client.wait(call, LIMIT_S)
    assert got is not None, client.why_gone or "no answer"
    return got


def figures(client: Client) -> dict[str, int]:
    got = answer(client, client.stats(check=True))
    assert isinstance(got, m.Stats)
    assert got.problem == ""
    return got.figures


def until(client: Client, right: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Asks for the figures until they are right; each question is a round trip, nothing sleeps."""
    for _ in range(100_000):
        got = figures(client)
        if right(got):
            return got
    raise AssertionError(got)


def put(client: Client, *numbers: int) -> list[int]:
    granted = answer(client, client.reserve(digests(*numbers)))
    assert isinstance(granted, m.Granted)
    call = client.commit(granted.lease, range(len(numbers)), [b"s"] * len(numbers))
    done = answer(client, call)
    assert isinstance(done, m.Committed)
    assert all(done.done)
    client.release(granted.lease)
    return granted.offsets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "store"


@pytest.fixture
def running(path: Path) -> Iterator[RunningStore]:
    with shared_store(path, OPTIONS) as running:
        yield running


@pytest.fixture
def connect(path: Path, running: RunningStore) -> Iterator[Callable[..., Client]]:
    """Makes clients of the shared store; all are closed in the end."""
    clients: list[Client] = []

    def make(first: m.Hello | None = None) -> Client:
        clients.append(Joining(join_shared(str(path), LIMIT_S), first or hello()).wait(LIMIT_S))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def raw(path: Path, running: RunningStore) -> Iterator[socket.socket]:
    with join_shared(str(path), LIMIT_S) as sock:
        yield sock


def last_words(sock: socket.socket) -> m.FromStore:
    """The last message before the end of file."""
    reader, got = FrameReader(), []
    while data := sock.recv(1 << 16):
        got += reader.feed(data)
    return m.decoded_by_client(got[-1])


# ---- the good case ---------------------------------------------------------------------------------------------


def test_bytes_that_one_client_writes_another_reads(connect: Callable[..., Client]) -> None:
    one, other = connect(), connect()
    assert one.welcome.boot == other.welcome.boot
    assert one.welcome.session != other.welcome.session
    assert one.welcome.pool_nbytes == ROOM * CHUNK
    with Region.attach(os.dup(one.pool_fd)) as mine, Region.attach(os.dup(other.pool_fd)) as theirs:
        assert mine.nbytes == region_nbytes(ROOM * CHUNK)
        granted = answer(one, one.reserve(digests(1, 2)))
        assert isinstance(granted, m.Granted)
        for number, offset in enumerate(granted.offsets):
            mine.array[offset : offset + CHUNK] = number + 1
        call = other.fetch(digests(1, 2))
        assert answer(other, call) == m.Matched(
            call=call.number,
            lease=m.StoreLease(other.welcome.boot, 0),
            offsets=[],
            why=Miss.NOT_STORED,
            used_nbytes=2 * CHUNK,
        ), "readable before the commit"
        done = answer(one, one.commit(granted.lease, [0, 1], [b"a", b"b"]))
        assert isinstance(done, m.Committed)
        assert (done.done, done.used_nbytes, done.pinned_nbytes) == ([True, True], 2 * CHUNK, 0)
        found = answer(other, other.fetch(digests(1, 2, 3)))
        assert isinstance(found, m.Matched)
        assert [int(theirs.array[offset]) for offset in found.offsets] == [1, 2]
    assert figures(one)["pinned_nbytes"] == 2 * CHUNK
    other.release(found.lease)
    assert until(other, lambda now: now["pinned_nbytes"] == 0)["chunks"] == 2


def test_every_outcome_of_a_reservation_has_its_number(connect: Callable[..., Client]) -> None:
    one, other = connect(), connect()
    put(one, 1)
    assert isinstance(held := answer(one, one.fetch(digests(1))), m.Matched)
    assert held.lease
    answer(one, one.reserve(digests(2)))
    granted = answer(other, other.reserve(digests(1, 2, *range(3, 12))))
    assert isinstance(granted, m.Granted)
    assert granted.offsets[:2] == [m.PRESENT, m.BUSY]
    assert granted.offsets.count(m.NO_ROOM) == 3


def test_clear_discard_and_rename_go_through(connect: Callable[..., Client]) -> None:
    client = connect()
    put(client, 1, 2, 3)
    client.discard(digests(3))
    assert figures(client)["chunks"] == 2
    client.rename(b"o" * 16, "")
    assert isinstance(missed := answer(client, client.fetch(digests(1))), m.Matched)
    assert missed.offsets == []
    cleared = client.clear()
    assert answer(client, cleared) == m.Cleared(cleared.number, 0)
    cleared = client.clear(everything=True)
    assert answer(client, cleared) == m.Cleared(cleared.number, 2)


def test_an_abandoned_call_leaves_no_lease(connect: Callable[..., Client]) -> None:
    client = connect()
    put(client, 1)
    before, after = client.fetch(digests(1)), client.fetch(digests(1))
    client.abandon(before)
    answer(client, after)
    client.abandon(after)
    client.abandon(client.reserve(digests(2)))
    until(client, lambda now: now["pinned_nbytes"] == now["writing_nbytes"] == 0)


def test_over_a_socket_pair_the_loop_ends_with_its_only_client() -> None:
    source = ThreadSource(ROOM * CHUNK)
    client = Joining(source.connect(), hello()).wait(LIMIT_S)
    put(client, 1)
    client.close()
    source.end(wait=True)
    assert not source.running.thread.is_alive()


# ---- clients that do wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff\xff\xff\xff", "over the bound"),
        (framed(b"garbage"), "not a message"),
        (framed(m.encoded(m.Cleared(1, 1))), "not a message"),
        (framed(m.encoded(m.AskStats(1))), "must be a hello"),
        (framed(m.encoded(m.Bye())), "must be a hello"),
        (framed(m.encoded(hello(version=m.VERSION + 1))), f"version {m.VERSION + 1} is not {m.VERSION}"),
        (framed(m.encoded(hello(nbytes=0))), "chunk_nbytes must be positive"),
        (framed(m.encoded(hello(holders=tuple(range(1, 252))))), "at most 250 processes"),
        (framed(m.encoded(hello())) * 2, "hello once"),
        (framed(m.encoded(hello())) + framed(m.encoded(m.Fetch(call=1, digests=b"x" * 33))), "whole number of digests"),
        (framed(m.encoded(hello())) + framed(m.encoded(m.Rename(b"short", ""))), "a namespace has 16 bytes"),
    ],
)
def test_a_client_that_breaks_the_protocol_is_refused_and_the_others_go_on(
    connect: Callable[..., Client], raw: socket.socket, data: bytes, why: str
) -> None:
    other = connect()
    put(other, 1)
    raw.sendall(data)
    refused = last_words(raw)
    assert isinstance(refused, m.Refused)
    assert refused.code == "wire"
    assert why in refused.text
    assert figures(other)["chunks"] == 1


def test_the_refusal_reaches_a_client_that_is_joining(path: Path, running: RunningStore) -> None:
    with pytest.raises(WireError, match="use the same kvkeep on both sides"):
        Joining(join_shared(str(path), LIMIT_S), hello(version=9)).wait(LIMIT_S)


def test_a_client_that_does_not_read_is_disconnected(
    connect: Callable[..., Client], raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.store.server.server.MAX_UNSENT_NBYTES", 1 << 16)
    other = connect()
    raw.sendall(framed(m.encoded(hello())))
    many = framed(m.encoded(m.AskStats(1))) * 1000

    def flood() -> None:
        for _ in range(1000):
            raw.sendall(many)

    with pytest.raises(ConnectionError):
        flood()
    assert until(other, lambda now: now["sessions"] == 1)


def test_an_invented_lease_changes_nothing(connect: Callable[..., Client]) -> None:
    one, other = connect(), connect()
    granted = answer(one, one.reserve(digests(1)))
    put(one, 2)
    held = answer(one, one.fetch(digests(2)))
    assert isinstance(granted, m.Granted)
    assert isinstance(held, m.Matched)
    boot = other.welcome.boot
    invented = [m.StoreLease(boot, number) for number in (10**6, -1, 2**63)]
    for lease in (granted.lease, held.lease, *invented):
        done = answer(other, other.commit(lease, [0, 2**62, -1], [b"", b"", b""]))
        assert isinstance(done, m.Committed)
        assert done.done == [False] * 3
        other.release(lease)
    now = figures(other)
    assert (now["writing_nbytes"], now["pinned_nbytes"]) == (CHUNK, CHUNK)


def served_alone(store: Store, *sent: m.ToStore) -> None:
    """Runs a private server in this thread over a client that has sent this and is gone already."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Region.create(ROOM * CHUNK) as region, ours:
        ours.sendall(b"".join(framed(m.encoded(one)) for one in sent))
        ours.shutdown(socket.SHUT_WR)
        asyncio.run(Server(TierWalk(store, region.array), bytes(16), region.fd, private=theirs).serve())


def new_store() -> Store:
    return Store(Index(FreeList(ROOM * CHUNK), lru()), ROOM * CHUNK)


@pytest.mark.parametrize("pid", [-(2**40), -1, 0, 2**22 + 1, 2**31, 2**63])
def test_a_holder_that_no_process_can_be_is_refused(
    raw: socket.socket, connect: Callable[..., Client], pid: int
) -> None:
    other = connect()
    raw.sendall(framed(m.encoded(hello(holders=(pid,)))))
    refused = last_words(raw)
    assert isinstance(refused, m.Refused)
    assert "no process id" in refused.text
    assert figures(other)["sessions"] == 1


def test_a_process_that_cannot_be_watched_is_not_taken_for_dead() -> None:
    store = new_store()
    served_alone(store, hello(), m.Reserve(1, b"".join(digests(1))))
    assert store.figures()["quarantined_nbytes"] == CHUNK


def test_who_held_nothing_leaves_nothing(connect: Callable[..., Client], raw: socket.socket) -> None:
    other = connect()
    raw.sendall(framed(m.encoded(hello())))  # without a pidfd: its end could not be seen
    until(other, lambda now: now["sessions"] == 2)
    raw.close()
    assert until(other, lambda now: now["sessions"] == 1)["lingering"] == 0


def copies(fd: int) -> int:
    """How many descriptors of this process are of the same file."""
    count, inode = 0, os.fstat(fd).st_ino
    for one in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.fstat(int(one)).st_ino == inode
    return count


def test_descriptors_that_a_client_should_not_send_are_closed(
    connect: Callable[..., Client], raw: socket.socket
) -> None:
    other = connect()
    with Region.create(CHUNK) as region:
        ours = copies(region.fd)
        socket.send_fds(raw, [b"\0"], [region.fd] * 200)
        assert isinstance(refused := last_words(raw), m.Refused)
        assert "no pidfd" in refused.text
        figures(other)
        assert copies(region.fd) == ours, "the server keeps what it did not ask for"


def test_more_descriptors_than_a_session_may_have_are_refused(raw: socket.socket) -> None:
    pidfd = os.pidfd_open(os.getpid())
    for _ in range(2):
        socket.send_fds(raw, [b"\0"], [pidfd] * 200)
    os.close(pidfd)
    assert isinstance(refused := last_words(raw), m.Refused)
    assert "more than 250 descriptors" in refused.text


# ---- a store that does wrong -----------------------------------------------------------------------------------


@pytest.fixture
def fake_store() -> Iterator[tuple[socket.socket, Joining]]:
    """The store's end of a socket pair whose other end is joining."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        yield theirs, Joining(ours, hello())
    theirs.close()


WELCOME = framed(m.encoded(m.Welcome(boot=bytes(16), session=1, pid=1, pool_nbytes=CHUNK)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (framed(m.encoded(m.Refused("wire", "no"))), "refused the session: no"),
        (WELCOME, "without a pool"),
        (framed(m.encoded(m.Cleared(1, 1))), "without a pool"),
        (framed(b"garbage"), "not a message"),
        (b"\xff\xff\xff\xff", "over the bound"),
    ],
)
def test_a_welcome_that_is_none(fake_store: tuple[socket.socket, Joining], data: bytes, why: str) -> None:
    store, joining = fake_store
    assert joining.poll() is None
    store.sendall(data)
    with pytest.raises(WireError, match=why):
        joining.wait(LIMIT_S)


def test_a_store_that_is_gone_before_its_welcome(fake_store: tuple[socket.socket, Joining]) -> None:
    store, joining = fake_store
    store.close()
    with pytest.raises(StoreGone):
        joining.wait(LIMIT_S)


def test_no_welcome_in_time(fake_store: tuple[socket.socket, Joining]) -> None:
    with pytest.raises(StoreGone, match="within 0 s"):
        fake_store[1].wait(0)


def welcomed(fake_store: tuple[socket.socket, Joining]) -> tuple[socket.socket, Client]:
    store, joining = fake_store
    with Region.create(CHUNK) as region:
        socket.send_fds(store, [WELCOME], [region.fd] * 2)
    return store, joining.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (framed(m.encoded(m.Refused("wire", "tired"))), "ended the session: tired"),
        (WELCOME, "a second welcome"),
        (framed(b"\x93"), "not a message"),
        (b"\xff\xff\xff\xff", "over the bound"),
    ],
)
def test_a_store_that_breaks_the_protocol_is_lost(
    fake_store: tuple[socket.socket, Joining], data: bytes, why: str
) -> None:
    store, client = welcomed(fake_store)
    call = client.fetch(digests(1))
    store.sendall(data)
    assert client.wait(call, LIMIT_S) is None
    assert call.failed
    assert not client.alive
    assert why in client.why_gone
    assert client.fetch(digests(1)).failed, "a lost client fails every call at once"
    client.close()


def test_answers_that_nobody_asked_for_are_left_alone(fake_store: tuple[socket.socket, Joining]) -> None:
    store, client = welcomed(fake_store)
    call = client.clear()
    store.sendall(framed(m.encoded(m.Matched(call=99, offsets=[0]))) + framed(m.encoded(m.Cleared(call.number, 3))))
    assert answer(client, call) == m.Cleared(call.number, 3)
    client.close()


def test_a_client_that_asks_a_store_that_has_refused_it_knows_why(fake_store: tuple[socket.socket, Joining]) -> None:
    store, client = welcomed(fake_store)
    store.sendall(framed(m.encoded(m.Refused("wire", "tired"))))
    store.close()
    assert client.stats().failed
    assert "ended the session: tired" in client.why_gone
    client.drop()


def test_a_store_that_does_not_read_is_lost(
    fake_store: tuple[socket.socket, Joining], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvkeep.wire.client.MAX_UNSENT_NBYTES", 1 << 16)
    _, client = welcomed(fake_store)
    for _ in range(1000):
        client.discard(digests(*range(200)))
    assert client.why_gone == "the store does not read"
    client.close()


def test_open_calls_are_bounded(fake_store: tuple[socket.socket, Joining], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.wire.client.MAX_OPEN_CALLS", 3)
    _, client = welcomed(fake_store)
    calls = [client.fetch([]) for _ in range(4)]
    assert all(call.failed for call in calls)
    assert not client.alive
    client.close()


# ---- ends ------------------------------------------------------------------------------------------------------


def test_a_goodbye_returns_everything_at_once(connect: Callable[..., Client]) -> None:
    one, other = connect(), connect()
    put(one, 1)
    answer(one, one.fetch(digests(1)))
    answer(one, one.reserve(digests(2)))
    one.close()
    now = until(other, lambda now: now["sessions"] == 1)
    assert now["pinned_nbytes"] == now["writing_nbytes"] == now["quarantined_nbytes"] == 0
    assert now["chunks"] == 1


@pytest.mark.process
def test_an_end_without_goodbye_keeps_the_memory_until_every_holder_is_dead(
    connect: Callable[..., Client], path: Path
) -> None:
    control = connect()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", HOLDER], **pipes) as holder,
        subprocess.Popen([sys.executable, "-c", CLIENT, str(path), str(holder.pid)], **pipes) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline().strip().isdigit()
        assert figures(control)["pinned_nbytes"] == figures(control)["writing_nbytes"] == CHUNK
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        now = until(control, lambda now: now["sessions"] == 1)
        assert now["quarantined_nbytes"] == 2 * CHUNK
        assert now["writing_nbytes"] == 0, "its key in the making is free"
        again = answer(control, control.reserve(digests(8)))
        assert isinstance(again, m.Granted)
        assert again.offsets[0] >= 0
        assert holder.poll() is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        now = until(control, lambda now: now["quarantined_nbytes"] == 0)
        assert now["pinned_nbytes"] == 0
        assert now["chunks"] == 1


def test_a_session_that_is_resumed_by_its_own_process_gives_back_what_it_held(connect: Callable[..., Client]) -> None:
    control, lost = connect(), connect()
    answer(lost, lost.reserve(digests(1)))
    lost.drop()
    until(control, lambda now: now["quarantined_nbytes"] == CHUNK)
    connect(hello(resumes=999))
    assert figures(control)["quarantined_nbytes"] == CHUNK
    connect(hello(resumes=lost.welcome.session))
    assert figures(control)["quarantined_nbytes"] == 0
