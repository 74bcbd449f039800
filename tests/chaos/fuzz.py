"""`make fuzz`: hostile clients of several kinds (`attacks.py`) against a real store, while a client goes on that behaves.

Ends with 1 if the store ended, an answer to the client that behaves was wrong, something is left over, the index does
not add up or, with bounds for them, its answers came late. Such bounds are for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from attacks import BATCH, CHUNK, GOOD, LIMIT_S, ROOM, Attackers

from kvkeep.config import Config
from kvkeep.errors import StoreGone
from kvkeep.memory.region import Region
from kvkeep.wire import messages as m
from kvkeep.wire.client import Call, Client, Joining
from kvkeep.wire.start import join_shared

HELD_S = 60.0  # what dead clients held is back by then


@dataclass
class Behaving:
    """A client that stores chunks and finds them again, and how long each of its questions took (seconds)."""

    client: Client
    took_s: list[float] = field(default_factory=list)
    rounds: int = 0
    had_no_room: int = 0
    hits: int = 0

    def __post_init__(self) -> None:
        self.region = Region.attach(os.dup(self.client.pool_fd))

    def ask(self, question: Call) -> object:
        began = time.perf_counter()
        answer = self.client.wait(question, LIMIT_S)
        self.took_s.append(time.perf_counter() - began)
        return answer

    def once(self) -> None:
        """Stores a chunk and finds it again, before others that hostile clients may have put there."""
        self.rounds += 1
        digest = self.rounds.to_bytes(32, "little")
        granted = self.ask(self.client.reserve([digest]))
        assert isinstance(granted, m.Granted), self.client.why_gone
        if not granted.lease:
            self.had_no_room += 1
            return
        payload = np.frombuffer(self.rounds.to_bytes(8, "little") * (CHUNK // 8), dtype=np.uint8)
        self.region.array[granted.offsets[0] : granted.offsets[0] + CHUNK] = payload
        sums = xxhash.xxh3_128_digest(payload.data)
        done = self.ask(self.client.commit(granted.lease, [0], [sums]))
        assert isinstance(done, m.Committed), self.client.why_gone
        # False: one of the others has said "clear everything", which anybody may who maps the pool
        assert len(done.done) == 1
        self.client.release(granted.lease)
        found = self.ask(self.client.fetch([digest, *(bytes([n]) * 32 for n in range(1, 40))]))
        assert isinstance(found, m.Matched), self.client.why_gone
        if found.lease:
            self.hits += 1
            assert found.sums[0] == sums, "the sums are another chunk's"
            assert all(len(one) == len(sums) for one in found.sums.values())
            assert (self.region.array[found.offsets[0] : found.offsets[0] + CHUNK] == payload).all(), "wrong bytes"
        self.client.release(found.lease)

    def late(self, p99_ms: float | None, max_ms: float | None) -> list[str]:
        """Which of its bounds do not hold; None: there is none."""
        p99, most = self.ms()["p99"], self.ms()["max"]
        over = [f"p99 of {p99} ms is over {p99_ms}"] if p99_ms is not None and p99 > p99_ms else []
        return over + ([f"one answer took {most} ms, over {max_ms}"] if max_ms is not None and most > max_ms else [])

    def ms(self) -> dict[str, float]:
        """How long its questions took."""
        p50, p99, most = np.percentile(self.took_s, (50, 99, 100)) * 1000
        return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(most, 2)}


def listening(store: subprocess.Popen[bytes], path: str) -> socket.socket:
    """A connection to the store, which has only just been started: its socket may be there before it listens."""
    began = time.monotonic()
    while True:
        try:
            return join_shared(path, LIMIT_S)
        except StoreGone:
            assert store.poll() is None, "the store ended"
            assert time.monotonic() < began + LIMIT_S, "the store does not listen"


def at_rest(client: Client) -> m.Stats:
    """The store's figures once nothing is left of the others."""
    over = time.monotonic()
    while True:
        answer = client.wait(client.stats(check=True), LIMIT_S)
        assert isinstance(answer, m.Stats), client.why_gone
        if not answer.figures["lingering"] and answer.figures["sessions"] == 1:
            return answer
        assert time.monotonic() < over + HELD_S, f"something is still held: {answer.figures}"


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def played(
    store: subprocess.Popen[bytes], path: str, asked: argparse.Namespace
) -> tuple[m.Stats, Behaving, Attackers, int]:
    """All attacks on a store; what it says when they are over, who took part, how many descriptors more it has open."""
    good = m.Hello(
        name="good", namespace=GOOD, identity="", chunk_nbytes=CHUNK, holders=[], verify_every=1, sizes=[CHUNK]
    )
    behaving = Behaving(Joining(listening(store, path), good).wait(LIMIT_S))
    opened = descriptors(store.pid)
    attackers = Attackers(path, asked.seed, -(-asked.frames // BATCH))
    while not attackers.over:
        attackers.go_on()
        behaving.once()
    answer = at_rest(behaving.client)
    left_open = descriptors(store.pid) - opened
    behaving.client.close()
    behaving.region.close()
    return answer, behaving, attackers, left_open


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--p99-ms", type=float, help="what 99 of 100 answers to the client that behaves may take")
    parser.add_argument("--max-ms", type=float, help="what none of them may take longer than")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "store"
        config = Config(pool_size=ROOM * CHUNK, log_level="error")
        command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={config.json()}"]
        store = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            answer, behaving, attackers, left_open = played(store, str(path), asked)
            store.terminate()
            _, said = store.communicate(timeout=LIMIT_S)
        finally:
            store.kill()
    wrong = [text for text in (answer.problem, said.decode()[-2000:]) if text]
    if answer.figures["used_nbytes"] != answer.figures["committed_nbytes"] or left_open:
        wrong.append(f"bytes leaked, or {left_open} descriptors are still open")
    if attackers.failed:
        wrong.append(f"{attackers.failed} hostile clients were not answered as they should be: stderr says how")
    if store.returncode != 0:
        wrong.append(f"the store ended with {store.returncode}")
    if not behaving.hits:
        wrong.append("the client that behaves found nothing")
    wrong += behaving.late(asked.p99_ms, asked.max_ms)
    report = {"frames": asked.frames, "rounds of the client that behaves": behaving.rounds, "hits": behaving.hits}
    report |= {"had no room": behaving.had_no_room, "its answers (ms)": behaving.ms()}
    report |= {"took (s)": round(time.monotonic() - began, 1), "wrong": wrong}
    print(json.dumps(report | {"figures": answer.figures}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
