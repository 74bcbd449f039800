"""Clients that mean no good, or know no better: what they cost is theirs, and the others are served on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kvkeep.config import Config
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.store.namespaces import MOST
from kvkeep.store.server import reception as reception_module
from kvkeep.store.server import server as server_module
from kvkeep.store.server.answers import Checks
from kvkeep.store.server.lingering import Lingering
from kvkeep.store.server.server import MAX_ERRANDS
from kvkeep.telemetry import Figure
from kvkeep.testing.doubles.store_thread import RunningStore, shared_store
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.frames import MAX_FRAME_NBYTES, FrameReader, framed
from kvkeep.wire.processes import Credentials, Holders, holders_of
from kvkeep.wire.start import join_shared

CHUNK, ROOM, LIMIT_S = 4096, 16, 20.0
NAMESPACE = b"n" * 16


def hello(name: str = "good", namespace: bytes = NAMESPACE) -> m.Hello:
    return m.Hello(name=name, namespace=namespace, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "store"


@pytest.fixture
def running(path: Path) -> Iterator[RunningStore]:
    with shared_store(path, Config(pool_size=ROOM * CHUNK)) as running:
        yield running


@pytest.fixture
def good(path: Path, running: RunningStore) -> Iterator[Client]:
    client = join(path)
    yield client
    client.close()


@pytest.fixture
def raw(path: Path, running: RunningStore) -> Iterator[socket.socket]:
    with join_shared(str(path), LIMIT_S) as sock:
        yield sock


def join(path: Path) -> Client:
    return Joining(join_shared(str(path), LIMIT_S), hello()).wait(LIMIT_S)


def figures(client: Client, check: bool = True) -> dict[str, int]:
    answer = client.wait(client.stats(check=check), LIMIT_S)
    assert isinstance(answer, m.Stats), client.why_gone
    assert answer.problem == ""
    return answer.figures


def last_words(sock: socket.socket) -> str:
    """The text of the refusal before the end of file."""
    reader, got = FrameReader(), []
    while data := sock.recv(1 << 16):
        got += reader.feed(data)
    refused = m.decoded_by_client(got[-1])
    assert isinstance(refused, m.Refused)
    return refused.text


def welcomed(raw: socket.socket) -> None:
    """The hostile client says its hello like anybody else."""
    raw.sendall(framed(m.encoded(hello("hostile"))))
    data, fds, _, _ = socket.recv_fds(raw, 1 << 16, 4)
    assert data
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def standing_still(running: RunningStore) -> Iterator[None]:
    """The store's loop stands still, so that all that is sent meanwhile is there at once when it goes on."""
    begun, gate = threading.Event(), threading.Event()
    running.server._loop.call_soon_threadsafe(lambda: (begun.set(), gate.wait(LIMIT_S)))
    assert begun.wait(LIMIT_S)
    try:
        yield
    finally:
        gate.set()


# ---- descriptors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["memory", "fifo", "file"])
def test_what_is_only_named_as_a_process_is_refused(
    good: Client, raw: socket.socket, tmp_path: Path, what: str
) -> None:
    named = tmp_path / "anon_inode:[pidfd]"
    if what == "memory":
        fd = os.memfd_create("pidfd")
    elif what == "fifo":
        os.mkfifo(named)
        fd = os.open(named, os.O_RDWR)
    else:
        fd = os.open(named, os.O_RDWR | os.O_CREAT)
    socket.send_fds(raw, [framed(m.encoded(hello("hostile")))], [fd])
    os.close(fd)
    assert "no pidfd" in last_words(raw)
    now = figures(good)
    assert (now["sessions"], now["lingering"], now["quarantined_nbytes"]) == (1, 0, 0)


def test_without_descriptors_a_process_is_watched_although_nobody_can_tell_which_it_is() -> None:
    pidfd = os.pidfd_open(os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        holders = holders_of([pidfd], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert holders.alive == {pidfd: None}
    assert not holders.within(holders)
    holders.close()


def test_an_end_of_its_own_socket_does_not_keep_a_client_alive(good: Client, raw: socket.socket) -> None:
    socket.send_fds(raw, [b"\0"], [raw.fileno()])
    assert "no pidfd" in last_words(raw)


def test_a_process_that_the_kernel_does_not_watch_is_a_doubt(
    running: RunningStore, good: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = good.wait(good.reserve([bytes(32)]), LIMIT_S)
    assert isinstance(answer, m.Granted)
    with standing_still(running), contextlib.closing(asyncio.new_event_loop()) as loop:
        store = running.store
        (session,) = store.sessions.values()
        lingering = Lingering(store, loop)
        with caplog.at_level(logging.WARNING):
            lingering.add(session, Holders({os.open(tmp_path / "file", os.O_CREAT): None}))
        assert store.figures()["quarantined_nbytes"] == CHUNK, "memory that may still be written to is lent again"
        assert "out of use until this store ends" in caplog.text
        lingering.close()


# ---- who says nothing ------------------------------------------------------------------------------------------


def test_a_client_that_says_no_hello_is_ended(running: RunningStore, good: Client, path: Path) -> None:
    running.server.hello_limit_s = 0.01
    with join_shared(str(path), LIMIT_S) as silent:
        assert "no hello within" in last_words(silent)
    assert figures(good)["sessions"] == 1, "who has said its hello stays"


def test_silent_clients_give_their_places_up(good: Client, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 4)
    with contextlib.ExitStack() as ends:
        silent = [ends.enter_context(join_shared(str(path), LIMIT_S)) for _ in range(9)]
        late = join(path)
        assert figures(late)["sessions"] == 2
        assert silent[0].recv(1) == b"", "the one that has been there longest goes first"
        others = [join(path) for _ in range(2)]
        with pytest.raises(KVKeepError, match="4 clients are connected, and no more are taken"):
            join(path)
        for client in (late, *others):
            client.close()


def test_without_descriptors_nobody_is_taken_in_for_a_while_and_the_log_says_so_once(
    running: RunningStore,
    good: Client,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reception_module, "REST_S", LIMIT_S)
    reception = running.server._reception
    assert reception is not None
    listener, tries = reception.listener, []

    class Short:
        """A listener whose first accepts find no descriptor free."""

        def fileno(self) -> int:
            return listener.fileno()

        def setblocking(self, flag: bool) -> None:
            listener.setblocking(flag)

        def accept(self) -> tuple[socket.socket, object]:
            tries.append(1)
            if len(tries) < 4:
                raise OSError(errno.EMFILE, "too many open files")
            return listener.accept()

    with standing_still(running):
        reception.listener = Short()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        waiting = Joining(join_shared(str(path), LIMIT_S), hello())
        for rests in range(1, 4):
            while len(tries) < rests:
                figures(good)
            for _ in range(20):
                figures(good)
            assert len(tries) == rests, "it tries again without a rest"
            running.server._loop.call_soon_threadsafe(reception.open)
        waiting.wait(LIMIT_S).close()
    assert caplog.text.count("raise the limit of open files") == 1
    with standing_still(running):
        reception.listener = listener


# ---- cheap frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask", [m.AskStats(1), m.Fetch(call=1, digests=b""), m.Release(7)], ids=["stats", "fetch", "release"]
)
def test_a_flood_of_frames_gives_others_their_turn(
    running: RunningStore, good: Client, raw: socket.socket, monkeypatch: pytest.MonkeyPatch, ask: m.ToStore
) -> None:
    welcomed(raw)
    answered: list[str] = []
    answer = running.server._answer
    monkeypatch.setattr(
        running.server,
        "_answer",
        lambda peer, message: (answered.append(peer.session.opening.name), answer(peer, message)),
    )
    flood = framed(m.encoded(ask)) * 3000
    with standing_still(running):
        raw.sendall(flood[: 60 << 10])
        call = good.stats()
    assert isinstance(good.wait(call, LIMIT_S), m.Stats)
    assert answered[0] == "hostile"
    assert answered.index("good") <= 2 * 32


def test_a_client_waits_for_what_takes_long_before_it_may_ask_for_more_of_it(
    running: RunningStore, good: Client, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcomed(raw)
    under_way, most, gates = Counter[str](), Counter[str](), asyncio.Queue[None]()

    async def slow(verb: str, *_: object) -> None:
        under_way[verb] += 1
        most[verb] = max(most[verb], under_way[verb])
        await gates.get()
        under_way[verb] -= 1

    monkeypatch.setattr(running.server.walk, "clear", partial(slow, "clear"))
    monkeypatch.setattr(running.server.walk, "discard", partial(slow, "discard"))
    monkeypatch.setattr(server_module, "MAX_DISCARDS", 3)
    raw.sendall(b"".join(framed(m.encoded(m.Clear(n))) + framed(m.encoded(m.Discard(bytes(32)))) for n in range(1, 51)))
    assert figures(good)["sessions"] == 2, "the others are served meanwhile"
    loop = running.server._loop
    for _ in range(100):
        loop.call_soon_threadsafe(gates.put_nowait, None)
    reader, cleared = FrameReader(), 0
    while cleared < 50:
        cleared += sum(isinstance(m.decoded_by_client(frame), m.Cleared) for frame in reader.feed(raw.recv(1 << 16)))
    assert most == {"clear": MAX_ERRANDS, "discard": 3}


def test_a_client_goes_on_after_what_it_waited_for_died_of_a_bug(
    running: RunningStore, good: Client, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcomed(raw)

    async def buggy(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(running.server.walk, "discard", buggy)
    monkeypatch.setattr(server_module, "MAX_DISCARDS", MAX_ERRANDS)
    running.server._loop.set_exception_handler(lambda *_: None)
    raw.settimeout(LIMIT_S)
    discards = framed(m.encoded(m.Discard(bytes(32)))) * (MAX_ERRANDS + 1)
    with standing_still(running):
        raw.sendall(discards + framed(m.encoded(m.AskStats(7))))
    answer = m.decoded_by_client(FrameReader().feed(raw.recv(1 << 16))[0])
    assert isinstance(answer, m.Stats)


def test_whoever_asks_for_a_check_meanwhile_shares_the_next_one() -> None:
    class Loop:
        """A loop whose time goes on when the test says so."""

        def __init__(self) -> None:
            self.now_s, self.calls = 0.0, list[tuple[float, Callable[[], None]]]()

        def time(self) -> float:
            return self.now_s

        def call_at(self, when_s: float, call: Callable[[], None]) -> None:
            self.calls.append((when_s, call))

        def run(self) -> None:
            self.now_s, call = self.calls.pop()
            call()

    loop, made, told = Loop(), [], []

    def check() -> m.Stats:
        made.append(loop.now_s)
        loop.now_s += 0.01
        return m.Stats(call=0, rows=[Figure("number", "", len(made))])

    checks = Checks(check, loop)  # type: ignore[arg-type]
    checks.ask(told.append)
    loop.run()
    for _ in range(1000):
        checks.ask(told.append)
    assert len(loop.calls) == 1
    loop.run()
    assert made == pytest.approx([0.0, 0.01 + 0.2])
    assert [stats.figures["number"] for stats in told] == [1] + [2] * 1000, (
        "an answer that was made before the question"
    )


# ---- reservations ----------------------------------------------------------------------------------------------

RESERVES = """
import os, sys
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining
from kvkeep.wire.start import join_shared
for _ in range(3):
    hello = m.Hello(name="hog", namespace=b"h" * 16, identity="", chunk_nbytes=4096, holders=[])
    client = Joining(join_shared(sys.argv[1], 20.0), hello).wait(20.0)
    granted = client.wait(client.reserve([os.urandom(32) for _ in range(16)]), 20.0)
    print(sum(offset >= 0 for offset in granted.offsets))
    client.drop()
"""


@pytest.mark.process
def test_a_process_that_comes_back_without_a_goodbye_gets_no_share_anew(good: Client, path: Path) -> None:
    assert good.wait(good.fetch([bytes(32)]), LIMIT_S) is not None
    done = subprocess.run([sys.executable, "-c", RESERVES, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOM // 2), "0", "0"]


# ---- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("char", ["\x1b", "😀", "x", "\n"])
def test_no_names_are_too_long_to_be_told(good: Client, path: Path, char: str) -> None:
    """All known namespaces, each with the longest name and identity, are one answer."""
    known = [bytes([n]) * 16 for n in range(MOST)]
    for namespace in known:
        asked = msgspec.structs.replace(hello(char * 300, namespace), identity=char * (20 << 10))
        Joining(join_shared(str(path), LIMIT_S), asked).wait(LIMIT_S).close()
    good.rename(known[0], char * (900 << 10))
    answer = good.wait(good.stats(check=True), LIMIT_S)
    assert isinstance(answer, m.Stats), good.why_gone
    assert {one.namespace for one in answer.known} == {*known}
    assert len(m.encoded(answer)) < MAX_FRAME_NBYTES // 2


def test_a_name_forges_no_line_of_the_log(good: Client, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        Joining(join_shared(str(path), LIMIT_S), hello("x\n\x1b[2Jsession 1 opened by root")).wait(LIMIT_S).close()
        assert figures(good)["sessions"] == 1
    assert r"opened by x\n\x1b[2Jsession 1" in caplog.text
    assert "\x1b" not in caplog.text
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_an_identity_of_anything_ends_nothing(good: Client, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n, identity in enumerate((" ", "x ", "\n \n", "\x0b \x1c")):
        asked = msgspec.structs.replace(hello("same", bytes([n]) * 16), identity=identity)
        client = Joining(join_shared(str(path), LIMIT_S), asked).wait(LIMIT_S)
        assert figures(client)["sessions"] == 2
        client.close()
    assert not [record for record in caplog.records if record.name == "asyncio"], "a turn ended by an exception"


# ---- whose store -----------------------------------------------------------------------------------------------

LISTENS = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX); sock.bind(sys.argv[1]); sock.listen()
print("listening", flush=True); sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_store_of_another_user_is_not_joined() -> None:
    folder = Path("/tmp") / f"kvkeep-test-{os.getpid()}"  # where another user may make a socket
    folder.mkdir()
    folder.chmod(0o777)
    path = folder / "store"
    try:
        with subprocess.Popen(
            [sys.executable, "-c", LISTENS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"listening\n"
            with pytest.raises(ConfigError, match="is run by user 65534"):
                join_shared(str(path), LIMIT_S)
            other.kill()
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()


def test_a_client_of_another_user_is_told_why_it_is_refused(
    running: RunningStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception_module, "credentials_of", lambda _: Credentials(7, 12345))
    with join_shared(str(path), LIMIT_S) as sock:
        assert "refuses clients of user 12345" in last_words(sock)
