"""What hostile clients of `make fuzz` do: each kind of attack is one process for one batch, then it is gone."""

from __future__ import annotations

import os
import random
import select
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import msgspec

from kvkeep.errors import KVKeepError, StoreGone
from kvkeep.store.server.server import MAX_CLIENTS
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.frames import MAX_FRAME_NBYTES, framed
from kvkeep.wire.start import join_shared

CHUNK, ROOM = 4096, 64
GOOD = b"g" * 16  # the namespace of the client that behaves
PROCESSES = 3
BATCH = 2000
FLOODS, FLOOD_NBYTES = 4, 512 << 10
LIMIT_S = 20.0


def hello(namespace: bytes = b"f" * 16) -> m.Hello:
    return m.Hello(
        name="fuzz", namespace=namespace, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()], sizes=[CHUNK]
    )


def connected(path: str) -> socket.socket:
    """A connection to the store; the queue at its door is full while others connect by the hundred."""
    end_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return join_shared(path, LIMIT_S)
        except StoreGone:
            if time.monotonic() > end_s:
                raise


def joined(path: str, asked: m.Hello) -> Client:
    """A welcomed client; until its hello is read it may have to give its place up to others."""
    end_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return Joining(connected(path), asked).wait(LIMIT_S)
        except KVKeepError:
            if time.monotonic() > end_s:
                raise


def joined_socket(path: str, asked: m.Hello) -> socket.socket:
    """A welcomed client of which only the socket is left, to send anything over."""
    client = joined(path, asked)
    os.close(client.pool_fd)
    client.sock.settimeout(LIMIT_S)
    return client.sock


# ---- wild frames -----------------------------------------------------------------------------------------------


def message(rng: random.Random) -> bytes:
    """A message that a client may send, with numbers out of anywhere."""
    number = rng.choice((0, 1, -1, rng.randrange(2000), 2**31, 2**62, -(2**63)))
    digests = b"".join(bytes([rng.randrange(40)]) * 32 for _ in range(rng.randrange(6)))
    sums = [bytes(16) if rng.random() < 0.9 else b"s"] * rng.randrange(4)
    kinds: list[Callable[[], m.ToStore]] = [
        lambda: m.Fetch(
            call=number,
            digests=digests,
            deadline_s=rng.choice((0.0, -1.0, 1e300, float("nan"), 0.01)),
            limit_s=0.0,
            early=rng.random() < 0.5,
        ),
        lambda: m.Reserve(number, digests),
        lambda: m.Commit(number, rng.randrange(3000), [number, 0, 1], sums),
        lambda: m.Release(rng.randrange(3000)),
        lambda: m.Discard(digests),
        lambda: m.Clear(number, False),
        lambda: m.Rename(rng.choice((b"f" * 16, GOOD, b"short")), "x"),
        lambda: m.AskStats(number, rng.random() < 0.01),
        # never a process that lives and comes without its pidfd: what such a session holds stays out of use for ever
        lambda: msgspec.structs.replace(
            hello(), resumes=rng.randrange(50), holders=rng.choice(([], [0], [-1], [2**62]))
        ),
        m.Bye,
    ]
    weights = (20, 20, 20, 20, 5, 2, 1, 5, 1, 1)
    return m.encoded(rng.choices(kinds, weights)[0]())


def frame(rng: random.Random) -> bytes:
    """A whole one most of the time; else mutated, cut short, over the bound, or noise."""
    payload = message(rng)
    kind = rng.random()
    if kind < 0.6:
        return framed(payload)
    if kind < 0.9:
        changed = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return framed(bytes(changed[: rng.randrange(1, len(changed) + 1)] if rng.random() < 0.3 else changed))
    if kind < 0.97:
        return framed(rng.randbytes(rng.randrange(60)))
    if kind < 0.99:
        return framed(payload)[: rng.randrange(1, len(payload) + 4)]
    return rng.choice(((MAX_FRAME_NBYTES + 1).to_bytes(4, "big"), b"\xff\xff\xff\xff", framed(rng.randbytes(100_000))))


def wild(path: str, rng: random.Random) -> None:
    """Sends frames of every kind over as many connections as that takes."""
    sent = 0
    while sent < BATCH:
        with connected(path) as sock, suppress(OSError, KVKeepError):
            if rng.random() < 0.95:
                os.close(Joining(sock, hello()).wait(LIMIT_S).pool_fd)
            sock.settimeout(LIMIT_S)
            for _ in range(rng.randrange(1, 50)):
                sent += 1
                sock.sendall(frame(rng))
                if rng.random() < 0.2:  # mostly it does not read
                    sock.setblocking(False)
                    with suppress(BlockingIOError):
                        sock.recv(1 << 16)
                    sock.settimeout(LIMIT_S)


# ---- what each fault that was found came by -----------------------------------------------------------------------


def silent(path: str, _: random.Random) -> None:
    """More connections than there are places, which say nothing: the first of them is ended."""
    with ExitStack() as ends:
        socks = [ends.enter_context(connected(path)) for _ in range(MAX_CLIENTS + 20)]
        ended(socks[0])


def own_ends(path: str, _: random.Random) -> None:
    """Sends the store its own ends of the sockets, before the hello: they are not kept open by that."""
    for _ in range(100):
        with connected(path) as sock, suppress(ConnectionError):
            socket.send_fds(sock, [b"\0"], [sock.fileno()])
            ended(sock)


def flood(path: str, rng: random.Random) -> None:
    """Several clients at once send what costs them nothing; one of them does not read the answers."""
    asks = (m.AskStats(1, check=True), m.Clear(1), m.Discard(bytes(32)), m.Fetch(call=1, digests=b""), m.AskStats(1))
    with ExitStack() as ends:
        left: dict[int, tuple[socket.socket, bytearray]] = {}
        poll = select.poll()
        for number in range(FLOODS):
            sock = ends.enter_context(joined_socket(path, hello(bytes([number]) * 16)))
            sock.setblocking(False)
            flow = framed(m.encoded(rng.choice(asks)))
            left[sock.fileno()] = sock, bytearray(flow * (FLOOD_NBYTES // len(flow)))
            poll.register(sock, select.POLLOUT | (select.POLLIN if number else 0))
        while left:
            for fd, events in poll.poll(LIMIT_S * 1000):
                sock, unsent = left[fd]
                with suppress(BlockingIOError):
                    if events & (select.POLLHUP | select.POLLERR):  # it was ended, as it is if it does not read
                        unsent.clear()
                    elif events & select.POLLIN:
                        sock.recv(1 << 16)
                    else:
                        del unsent[: sock.send(unsent[: 64 << 10])]
                if not unsent:
                    poll.unregister(fd)
                    del left[fd]


def hog(path: str, rng: random.Random) -> None:
    """Reserves all that it can, again and again without a goodbye: together that is one share of the pool."""
    got = 0
    for _ in range(20):
        client = joined(path, hello())
        granted = client.wait(client.reserve([rng.randbytes(32) for _ in range(ROOM)]), LIMIT_S)
        assert isinstance(granted, m.Granted), client.why_gone
        got += sum(offset >= 0 for offset in granted.offsets)
        client.drop()
    assert got <= ROOM // 2, f"one process reserved {got} of {ROOM} chunks beside another client"


def names(path: str, rng: random.Random) -> None:
    """Calls itself anything, at any length, in many namespaces: what is known is told all the same."""

    def text(chars: int) -> str:
        return "".join(rng.choices("a \n\r\x00\x1b\x9b\u202e\u2028[/]é模😀\\", k=50)) * rng.choice((0, 1, chars // 50))

    for _ in range(10):
        asked = msgspec.structs.replace(hello(rng.randbytes(16)), name=text(1000), identity=text(20_000))
        client = joined(path, asked)
        for _ in range(10):
            client.rename(rng.randbytes(16), text(200_000))
        answer = client.wait(client.stats(check=True), LIMIT_S)
        assert isinstance(answer, m.Stats), client.why_gone
        assert all(one.name.isprintable() for one in answer.known)
        assert all(one.identity.replace("\n", "").isprintable() for one in answer.known)
        client.close()


def big_sums(path: str, rng: random.Random) -> None:
    """Commits sums of any length where the client that behaves will be sent them."""
    for _ in range(10):
        sizes = rng.choice(([], [CHUNK]))
        client = joined(path, msgspec.structs.replace(hello(GOOD), sizes=sizes))
        granted = client.wait(client.reserve([bytes([rng.randrange(40)]) * 32 for _ in range(3)]), LIMIT_S)
        assert isinstance(granted, m.Granted), client.why_gone
        places = [place for place, offset in enumerate(granted.offsets) if offset >= 0]
        sums = bytes(rng.choice((0, 15, 16, 64 << 10, 1 << 20)))
        client.wait(client.commit(granted.lease, places, [sums] * len(places)), LIMIT_S)
        right = len(sums) == 16 if sizes else len(sums) <= 64 << 10
        assert client.alive == (right or not places), f"{len(sums)} bytes of sums, sizes {sizes}: {client.why_gone}"
        client.drop()


def ended(sock: socket.socket) -> None:
    """Waits until the store has ended this connection."""
    sock.settimeout(LIMIT_S)
    with suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


FOUND = (silent, own_ends, flood, hog, names, big_sums)


def attack(path: str, seed: int) -> None:
    """One batch of a hostile client; every third is of wild frames."""
    os.nice(10)  # so that the store's share of the machine is not what is measured
    rng = random.Random(seed)
    kind = wild if seed % 3 == 0 else FOUND[(seed - seed // 3 - 1) % len(FOUND)]
    kind(path, rng)


@dataclass
class Attackers:
    """Keeps several hostile processes going, each for one batch: what a dead one held must come back."""

    path: str
    seed: int
    batches: int
    running: dict[int, int] = field(default_factory=dict)
    failed: int = 0

    @property
    def over(self) -> bool:
        return not self.batches and not self.running

    def go_on(self) -> None:
        """Starts the next ones and takes in the ends of others."""
        while self.batches and len(self.running) < PROCESSES:
            self.batches -= 1
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    attack(self.path, self.seed + self.batches)
                    status = 0
                finally:
                    if status:
                        traceback.print_exc()
                    os._exit(status)
            self.running[pid] = self.batches
        pid, status = os.waitpid(-1, os.WNOHANG) if self.running else (0, 0)
        if self.running.pop(pid, None) is not None:
            self.failed += status != 0
