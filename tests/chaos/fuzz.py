"""`make fuzz`: random and mutated frames from several clients against a real store, while a well-behaved client goes on.

Ends with 1 if the store ended, an answer to the well-behaved client was wrong or late, or its index does not add up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvkeep.errors import StoreGone
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.frames import MAX_FRAME_NBYTES, framed
from kvkeep.wire.process import join_shared

CHUNK, ROOM = 4096, 64
CLIENTS = 3
BATCH = 2000
LIMIT_S = 20.0
LATE_S = 2.0
HELD_S = 60.0  # what dead clients held is back by then


def hello() -> m.Hello:
    return m.Hello(m.VERSION, "fuzz", b"f" * 16, "", CHUNK, [os.getpid()], sizes=[CHUNK])


def message(rng: random.Random) -> bytes:
    """A message that a client may send, with numbers out of anywhere."""
    number = rng.choice((0, 1, -1, rng.randrange(2000), 2**31, 2**62, -(2**63)))
    digests = b"".join(bytes([rng.randrange(40)]) * 32 for _ in range(rng.randrange(6)))
    kinds: list[Callable[[], m.ToStore]] = [
        lambda: m.Fetch(number, digests, rng.choice((0.0, -1.0, 1e300, float("nan"), 0.01)), 0.0, rng.random() < 0.5),
        lambda: m.Reserve(number, digests),
        lambda: m.Commit(number, rng.randrange(3000), [number, 0, 1], [b"s"] * rng.randrange(4)),
        lambda: m.Release(rng.randrange(3000)),
        lambda: m.Discard(digests),
        lambda: m.Clear(number, False),
        lambda: m.Rename(rng.choice((b"f" * 16, b"g" * 16, b"short")), "x"),
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


def attack(path: str, seed: int) -> None:
    """A hostile client: sends a batch of frames over as many connections as that takes."""
    rng, sent = random.Random(seed), 0
    while sent < BATCH:
        with join_shared(path, LIMIT_S) as sock, suppress(OSError):
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
        while self.batches and len(self.running) < CLIENTS:
            self.batches -= 1
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    attack(self.path, self.seed + self.batches)
                    status = 0
                finally:
                    os._exit(status)
            self.running[pid] = self.batches
        pid, status = os.waitpid(-1, os.WNOHANG) if self.running else (0, 0)
        if self.running.pop(pid, None) is not None:
            self.failed += status != 0


def behave(client: Client, number: int) -> float:
    """Stores a chunk and finds it again; how long the slower of its questions took."""
    digest = number.to_bytes(32, "big")
    began = time.perf_counter()
    granted = client.wait(client.reserve([digest]), LIMIT_S)
    assert isinstance(granted, m.Granted), client.why_gone
    slowest = time.perf_counter() - began
    if granted.lease:
        done = client.wait(client.commit(granted.lease, [0], [b"sum"]), LIMIT_S)
        assert isinstance(done, m.Committed), client.why_gone
        # False: one of the others has said "clear everything", which anybody may who maps the pool
        assert len(done.done) == 1
        client.release(granted.lease)
        began = time.perf_counter()
        found = client.wait(client.fetch([digest]), LIMIT_S)
        assert isinstance(found, m.Matched), client.why_gone
        client.release(found.lease)
        slowest = max(slowest, time.perf_counter() - began)
    return slowest


def listening(store: subprocess.Popen[bytes], path: str) -> socket.socket:
    """A connection to the store, which has only just been started: its socket may be there before it listens."""
    began = time.monotonic()
    while True:
        try:
            return join_shared(path, LIMIT_S)
        except StoreGone:
            assert store.poll() is None, "the store ended"
            assert time.monotonic() < began + LIMIT_S, "the store does not listen"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "store"
        command = [sys.executable, "-m", "kvkeep.wire", f"--socket={path}", f"--pool-nbytes={ROOM * CHUNK}"]
        store = subprocess.Popen([*command, "--log-level=error"], stderr=subprocess.PIPE)
        good = m.Hello(m.VERSION, "good", b"g" * 16, "", CHUNK, [])
        client = Joining(listening(store, str(path)), good).wait(LIMIT_S)
        attackers = Attackers(str(path), asked.seed, -(-asked.frames // BATCH))
        slowest, rounds = 0.0, 0
        while not attackers.over:
            attackers.go_on()
            slowest, rounds = max(slowest, behave(client, rounds)), rounds + 1
        over = time.monotonic()
        answer = client.wait(client.stats(check=True), LIMIT_S)
        while isinstance(answer, m.Stats) and (answer.figures["lingering"] or answer.figures["sessions"] > 1):
            assert time.monotonic() < over + HELD_S, f"something is still held: {answer.figures}"
            answer = client.wait(client.stats(check=True), LIMIT_S)
        assert isinstance(answer, m.Stats), client.why_gone
        client.close()
        store.terminate()
        _, said = store.communicate(timeout=LIMIT_S)
    wrong = [text for text in (answer.problem, said.decode()[-2000:]) if text]
    if answer.figures["used_nbytes"] != answer.figures["committed_nbytes"] or attackers.failed:
        wrong.append(f"bytes leaked, or {attackers.failed} hostile clients failed in a way of their own")
    if store.returncode != 0:
        wrong.append(f"the store ended with {store.returncode}")
    if slowest > LATE_S:
        wrong.append(f"the well-behaved client waited for {slowest:.1f} s")
    report = {"frames": asked.frames, "rounds of the good client": rounds, "its slowest answer (s)": round(slowest, 3)}
    report |= {"took (s)": round(time.monotonic() - began, 1), "wrong": wrong}
    print(json.dumps(report | {"figures": answer.figures}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
