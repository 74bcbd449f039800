"""Times lookups of several client processes at one store process, and weighs an idle store: `kvkeep bench daemon`.

The rates are those of a busy host; the yardstick is a bare echo over a socket. Knows nothing about engines.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from kvkeep.bench.rows import Case, Row, expect, say
from kvkeep.config import Config
from kvkeep.errors import StoreGone
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.messages import Granted, Hello, Matched
from kvkeep.wire.start import join_shared

CLIENTS = 4
CHUNKS = 32
MANY_CHUNKS = 512
LOOKUPS = 2000
RATE = 250.0
SLOW_LOOKUPS = 500
ANSWER_NBYTES = 200
SMALL_NBYTES = 4096
LIMIT_S = 30.0


@contextmanager
def serving(pool_nbytes: int) -> Iterator[tuple[Path, int]]:
    """A store process: its socket and its pid."""
    config = Config(pool_size=pool_nbytes, max_pinned_share=1.0, log_level="error")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "store"
        command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={config.json()}"]
        with subprocess.Popen(command) as process:  # noqa: S603
            try:
                joined(path).close()
                yield path, process.pid
            finally:
                process.terminate()
                process.wait(LIMIT_S)


def hello(chunk_nbytes: int) -> Hello:
    """The first message of a benchmark's session, whose chunks have `chunk_nbytes`."""
    return Hello(
        name="bench",
        namespace=bytes(16),
        identity="bench",
        chunk_nbytes=chunk_nbytes,
        holders=[os.getpid()],
        verify_every=64,
    )


def joined(path: Path) -> socket.socket:
    """A connection to a store that may still be starting; StoreGone after LIMIT_S."""
    end_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return join_shared(str(path), LIMIT_S)
        except StoreGone:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.02)


def client(path: Path, chunk_nbytes: int) -> Client:
    """A session of this process."""
    return Joining(joined(path), hello(chunk_nbytes)).wait(LIMIT_S)


def fill(joined: Client, count: int) -> list[bytes]:
    """Commits chunks without moving a byte; their digests."""
    digests = [secrets.token_bytes(32) for _ in range(count)]
    granted = joined.wait(joined.reserve(digests), LIMIT_S)
    assert isinstance(granted, Granted)
    assert min(granted.offsets) >= 0
    joined.wait(joined.commit(granted.lease, range(count), [bytes(1024)] * count), LIMIT_S)
    joined.release(granted.lease)
    return digests


def look_up(joined: Client, digests: list[bytes]) -> float:
    """One lookup that finds all: how long the answer took."""
    start = time.perf_counter()
    answer = joined.wait(joined.fetch(digests), LIMIT_S)
    took = time.perf_counter() - start
    assert isinstance(answer, Matched)
    expect(len(answer.offsets) == len(digests), "every chunk is found")
    joined.release(answer.lease)
    return took


def lookups(path: Path, rate: float, count: int) -> list[float]:
    """The times of all lookups of four client processes, sorted; `rate` a second each (0: one after the other)."""
    pipes = []
    for _ in range(CLIENTS):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(target=_asking, args=(path, rate, count, theirs), daemon=True).start()
        pipes.append(ours)
    return sorted(itertools.chain(*(pipe.recv() for pipe in pipes)))


def _asking(path: Path, rate: float, count: int, out: Connection) -> None:
    joined = client(path, SMALL_NBYTES)
    digests = fill(joined, CHUNKS)
    times, due_s = [], time.perf_counter() + 0.2
    for _ in range(count):
        if rate:
            time.sleep(max(0.0, due_s - time.perf_counter()))
            due_s += 1 / rate
        times.append(look_up(joined, digests))
    out.send(times)
    joined.close()


def bare_round_trips(rate: float, count: int, nbytes: int = CHUNKS * 32) -> list[float]:
    """A Unix-stream echo of as many bytes as a lookup has, at `rate` a second: the times, sorted."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork() == 0:
        ours.close()
        while theirs.recv(1 << 16):
            theirs.send(bytes(ANSWER_NBYTES))
        os._exit(0)
    theirs.close()
    payload, times = bytes(nbytes), []
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


def lookup_rows(runs: int) -> list[Row]:
    """At 4 x 250 a second, the rate of a busy host; flat out; one client alone."""
    p50, p99, full, alone, many, rates, cpu_us = ([] for _ in range(7))
    bare, slow, bare_many = [], [], []
    with serving(1 << 30) as (path, pid):
        for run in range(runs):
            slow.append(bare_round_trips(RATE, SLOW_LOOKUPS))
            times = lookups(path, RATE, SLOW_LOOKUPS)
            p50.append(_share(times, 50))
            p99.append(_share(times, 99))
            before_s = _cpu_s(pid)
            times = lookups(path, 0.0, LOOKUPS)
            cpu_us.append((_cpu_s(pid) - before_s) / len(times) * 1e6)
            rates.append(2 * len(times) / (sum(times) / CLIENTS) / 1e3)
            full.append(_share(times, 50))
            bare.append(_share(bare_round_trips(0.0, LOOKUPS), 50))
            alone.append(_alone(path, CHUNKS))
            bare_many.append(_share(bare_round_trips(0.0, LOOKUPS, MANY_CHUNKS * 32), 50))
            many.append(_alone(path, MANY_CHUNKS))
            say(f"daemon: run {run + 1} of {runs}")
    at_rate = f"bare round trip, {RATE:.0f}/s (ms)"
    return [
        Case("daemon-lookup-p50", "ms", at_rate, goal="<= 0.1 ms").row(p50, [_share(times, 50) for times in slow]),
        Case("daemon-lookup-p99", "ms", at_rate, goal="<= 1 ms").row(p99, [_share(times, 99) for times in slow]),
        Case("daemon-lookup-p50-flat-out", "ms", "bare round trip (ms)").row(full, bare),
        Case("daemon-lookup-p50-one-client", "ms", "bare round trip (ms)").row(alone, bare),
        Case("daemon-lookup-512-one-client", "ms", "bare round trip (ms)").row(many, bare_many),
        Case("daemon-messages", "thousand/s", "one", better="higher").row(rates, [1.0]),
        Case("daemon-cpu", "us/lookup and release", "one").row(cpu_us, [1.0]),
    ]


def idle_rows(runs: int) -> list[Row]:
    """What a store of 1 GiB with four clients that do nothing takes beyond its pool."""
    with serving(1 << 30) as (path, pid):
        clients = [client(path, SMALL_NBYTES) for _ in range(CLIENTS)]
        mib = []
        for _ in range(runs):
            clients[0].wait(clients[0].stats(), LIMIT_S)
            mib.append(_own_mib(pid))
        for joined in clients:
            joined.close()
    return [Case("daemon-idle-mib", "MiB", "one", goal="<= 60 MiB").row(mib, [1.0])]


def _alone(path: Path, count: int) -> float:
    joined = client(path, SMALL_NBYTES)
    digests = fill(joined, count)
    times = sorted(look_up(joined, digests) for _ in range(LOOKUPS))
    joined.close()
    return _share(times, 50)


def _share(times: list[float], percent: int) -> float:
    """The time (ms) below which so many are."""
    return times[len(times) * percent // 100] * 1e3


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _own_mib(pid: int) -> float:
    """Memory of a process beyond its pool."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return (values["Pss"] - values["Pss_Shmem"]) / 1024
