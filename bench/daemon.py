"""The shared store as its clients see it: `python bench/daemon.py --json bench/results/daemon.json`.

Four client processes over one store process: lookups of 32 chunks, messages a second, CPU time a request, stores and
retrieves of 256 MiB of a model with 128 KiB a token, and what an idle store costs. Knows nothing about engines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rows import Case, Row, alternate, say, seconds, show, write
from store_load import hello, join

from kvkeep.memory.region import Region
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.messages import Granted, Matched

CLIENTS = 4
CHUNKS = 32
LOOKUPS = 2000
TOKEN_NBYTES = 128 << 10
CHUNK_NBYTES = 256 * TOKEN_NBYTES
MOVED_NBYTES = 256 << 20
MOVED_CHUNKS = MOVED_NBYTES // CHUNK_NBYTES
BLOCK_NBYTES = 16 * TOKEN_NBYTES  # what one block of 16 tokens has of all layers
LAYERS = 32
LIMIT_S = 30.0
RUNS = 7


@contextmanager
def serving(pool_nbytes: int) -> Iterator[tuple[Path, int]]:
    """A store process: its socket and its pid."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "store"
        command = [sys.executable, "-m", "kvkeep.wire", f"--socket={path}", f"--pool-nbytes={pool_nbytes}"]
        process = subprocess.Popen([*command, "--log-level=error", "--max-pinned-share=1.0"])
        join(path, LIMIT_S).close()
        try:
            yield path, process.pid
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def client(path: Path, chunk_nbytes: int) -> Client:
    return Joining(join(path, LIMIT_S), hello(chunk_nbytes)).wait(LIMIT_S)


def fill(one: Client, count: int) -> list[bytes]:
    """Commits chunks without moving a byte; their digests."""
    digests = [secrets.token_bytes(32) for _ in range(count)]
    granted = one.wait(one.reserve(digests), LIMIT_S)
    assert isinstance(granted, Granted)
    assert min(granted.offsets) >= 0
    one.wait(one.commit(granted.lease, range(count), [bytes(1024)] * count), LIMIT_S)
    one.release(granted.lease)
    return digests


def look_up(one: Client, digests: list[bytes]) -> float:
    start = time.perf_counter()
    answer = one.wait(one.fetch(digests), LIMIT_S)
    took = time.perf_counter() - start
    assert isinstance(answer, Matched)
    assert len(answer.offsets) == len(digests)
    one.release(answer.lease)
    return took


def asking(path: Path, rate: float, count: int, out: Any) -> None:
    """A client process: `count` lookups at `rate` a second (0: one after the other); sends their times."""
    one = client(path, 4096)
    digests = fill(one, CHUNKS)
    times, due = [], time.perf_counter() + 0.2
    for _ in range(count):
        if rate:
            time.sleep(max(0.0, due - time.perf_counter()))
            due += 1 / rate
        times.append(look_up(one, digests))
    out.send((min(times), sorted(times), time.perf_counter()))
    one.close()


def lookups(path: Path, rate: float, count: int = LOOKUPS) -> tuple[list[float], float]:
    """The times of all lookups of four clients, and how long it took."""
    pipes, began = [], time.perf_counter()
    for _ in range(CLIENTS):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(target=asking, args=(path, rate, count, theirs), daemon=True).start()
        pipes.append(ours)
    found = [pipe.recv() for pipe in pipes]
    return sorted(itertools.chain(*(times for _, times, _ in found))), time.perf_counter() - began


def bare_round_trips(rate: float, count: int) -> list[float]:
    """A Unix-stream echo of as many bytes as a lookup of 32 chunks has, at `rate` a second: the times, sorted."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def echo() -> None:
        while data := theirs.recv(1 << 16):
            theirs.send(data[:200])

    if os.fork() == 0:
        ours.close()
        echo()
        os._exit(0)
    theirs.close()
    payload, times = bytes(CHUNKS * 32), []
    for _ in range(count):
        if rate:
            time.sleep(1 / rate)
        start = time.perf_counter()
        ours.send(payload)
        ours.recv(1 << 16)
        times.append(time.perf_counter() - start)
    ours.close()
    os.wait()
    return sorted(times)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_mib(pid: int) -> float:
    """Memory of a process beyond its pool (MiB): what is its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    shared_pool = values["Pss_Shmem"]
    return (values["Pss"] - shared_pool) / 1024


def lookup_rows() -> list[Row]:
    """At 4 x 250 a second (a busy host's rate), and flat out."""
    bare = [bare_round_trips(0.0, 2000)[1000] * 1e3 for _ in range(RUNS)]
    slow = [bare_round_trips(250.0, 500) for _ in range(RUNS)]
    p50s, p99s, rates, cpus, p50s_full, alone = [], [], [], [], [], []
    with serving(1 << 30) as (path, pid):
        for _ in range(RUNS):
            times, _ = lookups(path, 250.0, 500)
            p50s.append(times[len(times) // 2] * 1e3)
            p99s.append(times[len(times) * 99 // 100] * 1e3)
        for _ in range(RUNS):
            before, began = cpu_s(pid), time.perf_counter()
            times, _ = lookups(path, 0.0)
            rates.append(2 * len(times) / (sum(times) / CLIENTS) / 1e3)
            cpus.append((cpu_s(pid) - before) / len(times) * 1e6)
            p50s_full.append(times[len(times) // 2] * 1e3)
            one = client(path, 4096)
            digests = fill(one, CHUNKS)
            alone.append(sorted(look_up(one, digests) for _ in range(LOOKUPS))[LOOKUPS // 2] * 1e3)
            one.close()
            say(f"{len(times)} lookups in {time.perf_counter() - began:.2f} s")
    bare_p50 = [times[len(times) // 2] * 1e3 for times in slow]
    bare_p99 = [times[len(times) * 99 // 100] * 1e3 for times in slow]
    return [
        Case("daemon-lookup-p50", "ms", "bare round trip, 250/s (ms)", goal="<= 0.1 ms").row(p50s, bare_p50),
        Case("daemon-lookup-p99", "ms", "bare round trip, 250/s (ms)", goal="<= 1 ms").row(p99s, bare_p99),
        Case("daemon-lookup-p50-flat-out", "ms", "bare round trip (ms)").row(p50s_full, bare),
        Case("daemon-lookup-p50-one-client", "ms", "bare round trip (ms)", goal="<= 0.1 ms").row(alone, bare),
        Case("daemon-messages", "thousand/s", "one", better="higher").row(rates, [1.0]),
        Case("daemon-cpu", "us/lookup and release", "one").row(cpus, [1.0]),
    ]


class Mover:
    """One client that stores and retrieves what an engine's cache of blocks (layer by layer) has, and a bare copy."""

    def __init__(self, one: Client, pool: np.ndarray, bare: np.ndarray) -> None:
        self.one, self.pool, self.bare = one, pool, bare
        self.blocks = np.ones((LAYERS, MOVED_NBYTES // BLOCK_NBYTES, BLOCK_NBYTES // LAYERS), np.uint8)
        self.digests: list[bytes] = []

    def copied(self, chunks: list[np.ndarray], out: bool) -> None:
        """Block by block, layer by layer, between the blocks and chunks."""
        number = 0
        for chunk in chunks:
            for piece in chunk.reshape(-1, LAYERS, BLOCK_NBYTES // LAYERS):
                for layer in range(LAYERS):
                    if out:
                        piece[layer] = self.blocks[layer, number]
                    else:
                        self.blocks[layer, number] = piece[layer]
                number += 1

    def of_pool(self, offsets: list[int]) -> list[np.ndarray]:
        assert len(offsets) == MOVED_CHUNKS
        assert min(offsets) >= 0
        return [self.pool[offset : offset + CHUNK_NBYTES] for offset in offsets]

    def memmove(self, out: bool) -> float:
        return speed(lambda: self.copied(np.split(self.bare, MOVED_CHUNKS), out))

    def store(self) -> float:
        def action() -> None:
            self.digests = [secrets.token_bytes(32) for _ in range(MOVED_CHUNKS)]
            granted = self.one.wait(self.one.reserve(self.digests), LIMIT_S)
            assert isinstance(granted, Granted)
            self.copied(self.of_pool(granted.offsets), out=True)
            self.one.wait(self.one.commit(granted.lease, range(MOVED_CHUNKS), [bytes(1024)] * MOVED_CHUNKS), LIMIT_S)
            self.one.release(granted.lease)

        return speed(action)

    def retrieve(self) -> float:
        def action() -> None:
            found = self.one.wait(self.one.fetch(self.digests), LIMIT_S)
            assert isinstance(found, Matched)
            self.copied(self.of_pool(found.offsets), out=False)
            self.one.release(found.lease)

        return speed(action)


def speed(action: Callable[[], object]) -> float:
    return MOVED_NBYTES / seconds(action) / 1e9


def moved(one: Client, pool: np.ndarray, bare: np.ndarray) -> list[list[float]]:
    """GB/s of: bare copies out of the blocks, stores, bare copies into the blocks, retrieves."""
    mover = Mover(one, pool, bare)
    return alternate(RUNS, lambda: mover.memmove(True), mover.store, lambda: mover.memmove(False), mover.retrieve)


def move_rows() -> list[Row]:
    """Stores and retrieves of 256 MiB by one client, beside the same copies to private and to shared memory."""
    rows = []
    with serving(2 * MOVED_NBYTES + CHUNK_NBYTES) as (path, _):
        one = client(path, CHUNK_NBYTES)
        with Region.attach(os.dup(one.pool_fd)) as region, Region.create(MOVED_NBYTES) as shared:
            region.populate(0, region.nbytes)
            shared.array[:] = 1
            for name, bare in (("private", np.ones(MOVED_NBYTES, np.uint8)), ("shared", shared.array)):
                bare_out, stored, bare_in, retrieved = moved(one, region.array, bare)
                end, yardstick = "" if name == "private" else "-shared", f"memmove, {name} memory (GB/s)"
                for case, ours, theirs in (("store", stored, bare_out), ("retrieve", retrieved, bare_in)):
                    found = Case(f"daemon-{case}{end}", "GB/s", yardstick, better="higher", goal=">= 0.9")
                    rows.append(found.row(ours, theirs))
            del bare
        one.close()
    return rows


def idle_row() -> Row:
    """A store of 1 GiB whose pool is populated, with four clients that do nothing."""
    with serving(1 << 30) as (path, pid):
        clients = [client(path, 4096) for _ in range(CLIENTS)]
        mib = []
        for _ in range(RUNS):
            clients[0].wait(clients[0].stats(), LIMIT_S)
            mib.append(own_mib(pid))
        for one in clients:
            one.close()
    return Case("daemon-idle-mib", "MiB", "one", goal="<= 60 MiB").row(mib, [1.0])


def digest_cost() -> dict[str, float]:
    """What sending all digests again costs, by how many there are: the median round trip in ms."""
    found = {}
    with serving(1 << 30) as (path, _):
        one = client(path, 4096)
        for count in (1, 32, 128, 512):
            digests = fill(one, count)
            missing = [secrets.token_bytes(32) for _ in range(count)]
            times, blank = [], []
            for _ in range(1000):
                times.append(look_up(one, digests))
                start = time.perf_counter()
                one.wait(one.fetch(missing), LIMIT_S)
                blank.append(time.perf_counter() - start)
            found[f"{count} hits"] = round(sorted(times)[500] * 1e3, 4)
            found[f"{count} misses"] = round(sorted(blank)[500] * 1e3, 4)
        one.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["lookup", "move", "idle", "digests"])
    asked = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "lookup": lookup_rows, "move": move_rows, "idle": lambda: [idle_row()],
    }  # fmt: skip
    rows = [row for name, part in parts.items() if asked.only in (None, name) for row in part()]
    if asked.only in (None, "digests"):
        say(f"a lookup by its digests (ms): {json.dumps(digest_cost())}")
    if rows:
        show(rows, "The shared store, four client processes")
        write(rows, asked.json)


if __name__ == "__main__":
    main()
