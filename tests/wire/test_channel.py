"""The channel's ends that need a real process or a worker's door, and the store's end of sessions that die."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.queue import lru
from kvkeep.core.units import BOOT_NBYTES
from kvkeep.errors import ConfigError, StoreGone, WireError
from kvkeep.memory.progress import region_nbytes
from kvkeep.memory.region import Region
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.server.listening import listen
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store
from kvkeep.testing.doubles.store_thread import RunningStore, shared_store
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.frames import framed
from kvkeep.wire.pool_socket import HandedPool, PoolDoor, send_pool
from kvkeep.wire.start import Child, join_shared, start_private

CHUNK, ROOM = 4096, 8
OPTIONS = Config(pool_size=ROOM * CHUNK, max_pinned_share=1.0, log_level="error")
LIMIT_S = 20.0
HOLDER = "import sys; sys.stdin.read()"
ONE, TWO = b"1" * BOOT_NBYTES, b"2" * BOOT_NBYTES


def hello(*holders: int, resumes: int = 0) -> m.Hello:
    return m.Hello(
        name="test",
        namespace=b"n" * 16,
        identity="",
        chunk_nbytes=CHUNK,
        holders=list(holders or (os.getpid(),)),
        verify_every=0,
        resumes=resumes,
    )


def digest(number: int) -> bytes:
    return bytes([number]) * 32


def figures(client: Client) -> dict[str, int]:
    got = client.wait(client.stats(check=True), LIMIT_S)
    assert isinstance(got, m.Stats), client.why_gone
    assert got.problem == ""
    return got.figures


# ---- a real child ----------------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[Child]:
    child = start_private(OPTIONS)
    try:
        yield child
    finally:
        child.kill()
        child.process.wait(LIMIT_S)


@pytest.mark.process
def test_a_private_store_lives_as_long_as_its_client(child: Child):
    client = Joining(child.sock, hello()).wait(LIMIT_S)
    assert client.welcome.pid == child.process.pid
    assert len(client.welcome.boot) == BOOT_NBYTES
    with Region.attach(os.dup(client.pool_fd), region_nbytes(client.welcome.pool_nbytes)) as region:
        granted = client.wait(client.reserve([digest(1)]), LIMIT_S)
        assert isinstance(granted, m.Granted)
        region.array[granted.offsets[0] :][:CHUNK] = 7
        client.wait(client.commit(granted.lease, [0], [b"s"]), LIMIT_S)
        matched = client.wait(client.fetch([digest(1), digest(2)]), LIMIT_S)
        assert isinstance(matched, m.Matched)
        assert matched.offsets == granted.offsets
    now = figures(client)
    assert (now["chunks"], now["pinned_nbytes"], now["pool_nbytes"]) == (1, CHUNK, ROOM * CHUNK)
    client.close()
    assert child.process.wait(LIMIT_S) == 0


@pytest.mark.process
def test_a_private_store_ends_with_its_client_s_file_also_without_a_goodbye(child: Child):
    client = Joining(child.sock, hello()).wait(LIMIT_S)
    client.wait(client.reserve([digest(1)]), LIMIT_S)
    client.drop()
    assert child.process.wait(LIMIT_S) == 0


@pytest.mark.process
def test_a_killed_store_is_noticed_and_fails_what_is_open(child: Child):
    client = Joining(child.sock, hello()).wait(LIMIT_S)
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.process.wait(LIMIT_S) == -signal.SIGKILL
    call = client.fetch([digest(1)])
    client.pump(LIMIT_S)
    assert not client.alive
    assert client.why_gone
    assert call.failed
    assert client.wait(client.stats(), LIMIT_S) is None
    assert client.open_calls == 0
    client.close()
    assert client.pool_fd == -1


@pytest.mark.process
def test_a_pool_stays_readable_after_its_store_was_killed(child: Child):
    client = Joining(child.sock, hello()).wait(LIMIT_S)
    with Region.attach(os.dup(client.pool_fd)) as region:
        region.array[:CHUNK] = 9
        child.process.kill()
        child.process.wait(LIMIT_S)
        assert int(region.array[:CHUNK].sum()) == 9 * CHUNK
        region.array[CHUNK : 2 * CHUNK] = 1  # a worker in the midst of a gather does not die either
    client.drop()


def test_a_pool_that_cannot_be_is_refused_before_a_process_is_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match="pool_size"):
        start_private(Config(pool_size=1 << 60))


# ---- a listening socket ----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "store"


@pytest.fixture
def running(path: Path) -> Iterator[RunningStore]:
    with shared_store(path, OPTIONS) as running:
        yield running


@pytest.fixture
def connect(path: Path, running: RunningStore) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(*holders: int, resumes: int = 0) -> Client:
        first = hello(*holders, resumes=resumes)
        clients.append(Joining(join_shared(str(path), LIMIT_S), first).wait(LIMIT_S))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_only_the_owner_gets_to_the_socket(path: Path):
    with listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_may_enter_is_refused(path: Path):
    path.parent.mkdir()
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="can be entered by others"):
        listen(path)
    assert not path.exists()


def test_the_socket_of_a_store_that_is_gone_is_replaced_and_a_living_one_is_not(path: Path):
    listen(path).close()
    with pytest.raises(StoreGone, match="kvkeep serve --socket"):
        join_shared(str(path), LIMIT_S)
    with listen(path), pytest.raises(ConfigError, match="answers"):
        listen(path)
    assert path.exists()


def test_a_holder_beyond_a_pid_is_refused_and_the_others_go_on(connect: Callable[..., Client]):
    good = connect()
    with pytest.raises(WireError, match="holder"):
        connect(2**31 + 1)
    assert figures(good)["sessions"] == 1


@pytest.mark.process
@pytest.mark.parametrize("goodbye", [True, False])
def test_memory_comes_back_at_a_goodbye_or_with_the_last_holder(connect: Callable[..., Client], goodbye: bool):
    control = connect()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE) as holder:
        lost = connect(holder.pid)  # we, who connected, are a holder too
        granted = lost.wait(lost.reserve([digest(1)]), LIMIT_S)
        assert isinstance(granted, m.Granted)
        if goodbye:
            lost.close()
        else:
            lost.drop()
        while (now := figures(control))["sessions"] != 1:
            pass
        assert now["quarantined_nbytes"] == (0 if goodbye else CHUNK)
        assert now["writing_nbytes"] == 0
        if not goodbye:
            connect(holder.pid, resumes=lost.welcome.session)
            assert figures(control)["quarantined_nbytes"] == 0


@pytest.mark.process
def test_another_process_cannot_resume_a_session_whose_holders_it_does_not_name(connect: Callable[..., Client]):
    control = connect()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE) as holder:
        lost = connect(holder.pid)
        lost.wait(lost.reserve([digest(1)]), LIMIT_S)
        lost.drop()
        connect(os.getpid(), resumes=lost.welcome.session)
        assert figures(control)["quarantined_nbytes"] == CHUNK


def turn(loop: asyncio.AbstractEventLoop) -> None:
    """One round of the loop: all that is ready, in the order in which it became so."""
    loop.call_soon(loop.stop)
    loop.run_forever()


@pytest.mark.process
def test_a_session_may_be_resumed_at_the_moment_in_which_its_holder_dies():
    with contextlib.ExitStack() as ends:
        region = ends.enter_context(Region.create(ROOM * CHUNK))
        server = Server(
            TierWalk(Store(Index(FreeList(ROOM * CHUNK), lru()), ROOM * CHUNK), region.array), bytes(16), region.fd
        )
        loop = ends.enter_context(contextlib.closing(asyncio.new_event_loop()))
        server.begin(loop)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        for one in itertools.chain(*pairs):
            ends.enter_context(one)
        (lost, _), (again, _) = pairs
        for _, theirs in pairs:
            server.accept(theirs)
        holder = ends.enter_context(subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE))
        pidfd = os.pidfd_open(holder.pid)
        ends.callback(os.close, pidfd)
        first = framed(m.encoded(hello(holder.pid))) + framed(m.encoded(m.Reserve(1, digest(1))))
        socket.send_fds(lost, [first], [pidfd])
        turn(loop)
        (number,) = server.store.sessions
        lost.close()
        turn(loop)
        assert server.store.figures()["quarantined_nbytes"] == CHUNK
        socket.send_fds(again, [framed(m.encoded(hello(holder.pid, resumes=number)))], [pidfd])
        holder.kill()
        holder.wait()
        turn(loop)
        assert server.store.figures()["quarantined_nbytes"] == 0
        assert server.store.figures()["sessions"] == 1


# ---- a worker's door -------------------------------------------------------------------------------------------


@pytest.fixture
def door() -> Iterator[PoolDoor]:
    door = PoolDoor()
    yield door
    door.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nobody_at_the_door(door: PoolDoor):
    assert door.take() == []


def test_all_pools_that_wait_are_given_in_their_order(door: PoolDoor):
    with Region.create(CHUNK) as old, Region.create(2 * CHUNK) as new:
        before = open_fds()
        send_pool(door.path, HandedPool(ONE, old.fd, old.fd), LIMIT_S)
        send_pool(door.path, HandedPool(TWO, new.fd, new.fd), LIMIT_S)
        first, newest = door.take()
        assert (first.boot, newest.boot) == (ONE, TWO)
        first.close()
        with Region.attach(newest.fd, 2 * CHUNK) as mine:
            new.array[5] = 77
            assert int(mine.array[5]) == 77
        os.close(newest.life)
        assert door.take() == []
        assert open_fds() == before


@pytest.mark.parametrize("boot", [b"", b"short", b"x" * (BOOT_NBYTES - 1)])
def test_a_pool_without_a_whole_boot_is_none(door: PoolDoor, boot: bytes):
    with Region.create(CHUNK) as region:
        before = open_fds()
        send_pool(door.path, HandedPool(boot, region.fd, region.fd), LIMIT_S)
        assert door.take() == []
        assert open_fds() == before


def test_a_boot_without_a_pool_is_none(door: PoolDoor):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(door.path)
        sock.send(ONE)
        assert door.take() == []


def test_a_sender_that_is_slow_is_not_turned_away(door: PoolDoor):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, Region.create(CHUNK) as region:
        sock.connect(door.path)
        assert door.take() == []
        socket.send_fds(sock, [ONE], [region.fd] * 2)
        (handed,) = door.take()
        handed.close()


def test_a_door_that_is_closed_is_out_of_reach(door: PoolDoor):
    door.close()
    door.close()
    assert not Path(door.path).parent.exists()
    assert door.take() == []
    with Region.create(CHUNK) as region, pytest.raises(StoreGone, match="did not take the pool"):
        send_pool(door.path, HandedPool(ONE, region.fd, region.fd), LIMIT_S)


def test_the_folder_of_a_door_is_its_owner_s(door: PoolDoor):
    assert stat.S_IMODE(Path(door.path).parent.stat().st_mode) == 0o700
