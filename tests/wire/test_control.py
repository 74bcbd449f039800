"""Control sessions: a tool asks about a store, gets none of its memory and changes no engine's share of it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import msgspec
import pytest

from kvkeep.cli.ask import control_session
from kvkeep.config import Config
from kvkeep.errors import WireError
from kvkeep.testing.doubles.store_thread import RunningStore, shared_store
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.frames import framed
from kvkeep.wire.start import join_shared

CHUNK, ROOM = 4096, 8
LIMIT_S = 20.0
ENGINE = m.Hello(name="engine", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()])
ASK_FROM_A_PROCESS = """
import sys
from kvkeep.cli.ask import control_session
with control_session(sys.argv[1], "tool") as client:
    print(client.wait(client.stats(check=True), 20.0).figures["sessions"], "here", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "store"


@pytest.fixture
def running(path: Path) -> Iterator[RunningStore]:
    with shared_store(path, Config(pool_size=ROOM * CHUNK, max_pinned_share=1.0)) as running:
        yield running


@pytest.fixture
def engine(path: Path, running: RunningStore) -> Iterator[Client]:
    client = Joining(join_shared(str(path), LIMIT_S), ENGINE).wait(LIMIT_S)
    yield client
    client.close()


def granted(client: Client, *numbers: int) -> m.Granted:
    answer = client.wait(client.reserve([bytes([number]) * 32 for number in numbers]), LIMIT_S)
    assert isinstance(answer, m.Granted)
    return answer


def test_it_is_welcomed_without_a_descriptor_and_is_no_session_of_the_store(path: Path, engine: Client) -> None:
    with control_session(str(path), "tool") as tool:
        assert (tool.pool_fd, tool.life_fd, tool.welcome.session) == (-1, -1, 0)
        assert tool.welcome.boot == engine.welcome.boot
        for check in (False, True):
            answer = tool.wait(tool.stats(check), LIMIT_S)
            assert isinstance(answer, m.Stats)
            assert (answer.figures["sessions"], answer.figures["lingering"], answer.problem) == (1, 0, "")


def test_it_gets_no_descriptor_that_a_client_would_not_take(path: Path, running: RunningStore) -> None:
    with join_shared(str(path), LIMIT_S) as sock:
        sock.sendall(framed(m.encoded(m.Control(name="tool"))))
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)
    assert isinstance(m.decoded_by_client(data[4:]), m.Welcome)
    assert fds == []


@pytest.mark.process
def test_it_changes_no_engine_s_share(path: Path, engine: Client) -> None:
    """A process of its own asks: sessions of one process count as one client."""
    command = [sys.executable, "-c", ASK_FROM_A_PROCESS, str(path)]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "1 here\n"
        assert all(offset >= 0 for offset in granted(engine, *range(ROOM)).offsets), "the whole pool is the engine's"
        tool.communicate("", timeout=LIMIT_S)
    assert tool.returncode == 0


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (m.Fetch(call=1, digests=bytes(32)), "Fetch"),
        (m.Reserve(1, bytes(32)), "Reserve"),
        (m.Commit(1, 1, [0], [b""]), "Commit"),
        (m.Release(1), "Release"),
        (m.Discard(bytes(32)), "Discard"),
        (m.Clear(1, everything=True), "Clear"),
        (m.Rename(bytes(16), ""), "Rename"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_may_not_ask_is_refused_by_name(path: Path, engine: Client, message: m.ToStore, name: str) -> None:
    chunk = granted(engine, 1)
    done = engine.wait(engine.commit(chunk.lease, [0], [b"s"]), LIMIT_S)
    assert isinstance(done, m.Committed)
    tool = Joining(join_shared(str(path), LIMIT_S), m.Control(name="tool")).wait(LIMIT_S)
    tool.sock.sendall(framed(m.encoded(message)))
    tool.pump(LIMIT_S)
    assert f"a control session may not send {name}" in tool.why_gone
    tool.drop()
    left = engine.wait(engine.stats(), LIMIT_S)
    assert isinstance(left, m.Stats)
    assert left.figures["chunks"] == 1


@pytest.mark.parametrize("first", [m.Control(name="tool"), ENGINE], ids=["control", "engine"])
def test_one_hello_is_enough(path: Path, running: RunningStore, first: m.Hello | m.Control) -> None:
    for again in (m.Control(name="tool"), ENGINE):
        client = Joining(join_shared(str(path), LIMIT_S), first).wait(LIMIT_S)
        client.sock.sendall(framed(m.encoded(again)))
        client.pump(LIMIT_S)
        assert "says hello once" in client.why_gone
        client.drop()


@pytest.mark.parametrize(
    "first",
    [
        m.encoded(m.Control(version=m.VERSION + 1, name="tool")),
        m.encoded(msgspec.structs.replace(ENGINE, version=m.VERSION + 1)),
        msgspec.msgpack.encode([18, m.VERSION + 1, {"a field": "of another form"}]),
        msgspec.msgpack.encode([1, m.VERSION + 1]),
    ],
    ids=["control", "engine", "another control", "another engine"],
)
def test_another_version_is_refused_with_both_whatever_else_it_says(
    path: Path, running: RunningStore, first: bytes
) -> None:
    with join_shared(str(path), LIMIT_S) as sock:
        sock.sendall(framed(first))
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    refused = m.decoded_by_client(answer[4:])
    assert isinstance(refused, m.Refused)
    assert f"version {m.VERSION + 1} is not {m.VERSION}: use the same kvkeep" in refused.text


def test_the_version_is_the_first_field_of_both_hellos_for_ever() -> None:
    for first in (ENGINE, m.Control(name="tool")):
        assert m.version_in(m.encoded(first)) == m.VERSION
    assert m.version_in(m.encoded(m.Reserve(7, b""))) is None
    assert m.version_in(b"garbage") is None


def test_a_store_of_the_first_versions_is_named_as_one(path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        joining = Joining(ours, m.Control(name="tool"))
        theirs.sendall(framed(m.encoded(m.Refused("wire", "not a message: Invalid value 18"))))
        with pytest.raises(WireError, match="another version of kvkeep"):
            joining.wait(LIMIT_S)


def test_a_lease_of_another_start_of_the_store_is_neither_released_nor_committed(engine: Client) -> None:
    chunk = granted(engine, 1)
    other = m.StoreLease(b"another start!!!", chunk.lease.number)
    engine.release(other)
    assert engine.commit(other, [0], [b"s"]).failed
    done = engine.wait(engine.commit(chunk.lease, [0], [b"s"]), LIMIT_S)
    assert isinstance(done, m.Committed)
    assert done.done == [True]


def test_sums_are_divided_so_that_each_commit_fits_a_frame() -> None:
    sums = [bytes(m.COMMIT_NBYTES // 3)] * 10
    parts = list(m.commit_parts(sums))
    assert [len(sums[part]) for part in parts] == [3, 3, 3, 1]
    assert [one for part in parts for one in range(10)[part]] == list(range(10))
    assert list(m.commit_parts([])) == []
    assert [len(sums[part]) for part in m.commit_parts([bytes(2 * m.COMMIT_NBYTES)] * 2)] == [1, 1]
