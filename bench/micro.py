"""The micro-benchmarks: a lookup, the copies, their sums, an engine's step beside a busy store. No engine runs.

`OMP_NUM_THREADS=1 python bench/micro.py [--only NAME ...] [--json FILE]`, under 3 minutes. Each case runs in turn
with its yardstick, on memory that was touched before. Copies are timed in CPU time, what waits in wall time.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest import mock

import torch
from store_load import CHUNK_NBYTES

from kvkeep.bench.daemon import hello, joined
from kvkeep.bench.rows import Case, Row, alternate, cpu_seconds, run_groups, seconds
from kvkeep.config import Config
from kvkeep.core.key import Chain, none_hash
from kvkeep.core.layout import ChunkLayout, GroupLayout, LayerLayout, ShardLayout
from kvkeep.engine.link import Link, PrivateSource
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.memory.pool import Pool
from kvkeep.memory.region import Region
from kvkeep.telemetry import Figures
from kvkeep.transfer import cpu as reference
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.messages import Committed, Granted

HERE = Path(__file__).resolve().parent
CHUNK_TOKENS = 256
LAYERS = 16
TOKEN_NBYTES = 2048  # K and V of one token in one layer: 8 heads of 64, bf16
LIMIT_S = 30.0
Measure = Callable[[], float]


# ---- a lookup ------------------------------------------------------------------------------------------------


def lookup_rows() -> list[Row]:
    """What the scheduler waits for when it asks for 8,192 tokens, 32 chunks present; and their hashing at arrival."""
    tokens = random.Random(1).choices(range(49_152), k=8192)
    layout = ChunkLayout(
        (ShardLayout(CHUNK_TOKENS, (GroupLayout(128, 0, (LayerLayout("layer", (4096,)),) * LAYERS),)),)
    )
    link = Link(
        PrivateSource(Config(pool_size=64 * layout.nbytes, log_level="error")), lambda _: hello(layout.nbytes), []
    )
    link.start(LIMIT_S)
    try:
        planner = Planner(link, layout, PlannerOptions(), Figures())
        fill(link, tokens)
        ours, trips = alternate(400, lookup(planner, tokens), round_trip(link))
        hashed, hashes = alternate(
            100, arrival(tokens), lambda: seconds(lambda: sha256(bytes(3 * 8192)).digest()) * 1e3
        )
    finally:
        link.close()
    lookups = Case("lookup-8k", "ms", "a bare round trip", goal="<= 0.3 ms").row(ours, trips)
    return [lookups, Case("arrival-8k", "ms", "SHA-256 of as many bytes").row(hashed, hashes)]


def arrival(tokens: list[int]) -> Measure:
    """What a request costs when it arrives: the digests of its chunks, from a list; milliseconds."""
    return lambda: seconds(lambda: Chain(CHUNK_TOKENS, none_hash()).extend(tokens)) * 1e3


def fill(link: Link, tokens: list[int]) -> None:
    """Makes all chunks of `tokens` present, without any bytes."""
    client = link.client
    assert client is not None
    digests = Chain(CHUNK_TOKENS, none_hash()).extend(tokens)
    granted = client.wait(client.reserve(digests), LIMIT_S)
    assert isinstance(granted, Granted)
    sums = [bytes(16 * LAYERS)] * len(digests)
    committed = client.wait(client.commit(granted.lease, range(len(digests)), sums), LIMIT_S)
    assert isinstance(committed, Committed)
    assert all(committed.done)


def lookup(planner: Planner, tokens: list[int]) -> Measure:
    """One lookup in milliseconds; the request's end, which gives the lease back, is not in it."""
    number = 0

    def measure() -> float:
        nonlocal number
        number += 1
        request = Request(f"request {number}", list(tokens), len(tokens), none_hash())
        planner.expect(request)
        start = time.perf_counter()
        while (claim := planner.match(request, 0)) is None:
            pass  # "ask again": on a busy machine the store is late
        elapsed_s = time.perf_counter() - start
        assert claim == len(tokens) - 1, f"{claim} tokens were offered"
        planner.end(request.name)
        return elapsed_s * 1e3

    return measure


def round_trip(link: Link) -> Measure:
    """A question about nothing and its answer, in milliseconds."""
    client = link.client
    assert client is not None
    return lambda: seconds(lambda: client.wait(client.fetch(()), LIMIT_S)) * 1e3


# ---- copies --------------------------------------------------------------------------------------------------


@dataclass
class Copies:
    """Engine blocks and a pool with room for `chunks`; which block belongs to which place was drawn at random."""

    pool: Pool
    transfer: ReferenceTransfer
    layers: list[torch.Tensor]
    chunks: list[tuple[Blocks, ...]]

    @property
    def gbytes(self) -> float:
        """10^9 bytes of one pass over all chunks."""
        return len(self.chunks) * self.transfer.shard.nbytes / 1e9

    def gather(self, seal: bool) -> None:
        """Every chunk, as a worker does it."""
        for number, blocks in enumerate(self.chunks):
            self.transfer.check(blocks, unique=False)
            with self.pool.lend(number * self.transfer.shard.nbytes, self.transfer.shard) as lease:
                self.transfer.gather(blocks, lease, seal)

    def scatter(self) -> None:
        """Every chunk, as a worker does it."""
        for number, blocks in enumerate(self.chunks):
            self.transfer.check(blocks, unique=True)
            with self.pool.lend(number * self.transfer.shard.nbytes, self.transfer.shard) as lease:
                self.transfer.scatter(lease, blocks, b"")

    def pieces(self) -> list[tuple[int, int]]:
        """The addresses (engine, pool) of every block of every layer, in the order in which `gather` copies them."""
        page = self.transfer.shard.groups[0].layers[0].page_nbytes
        starts = [layer.data_ptr() for layer in self.layers]
        pairs = []
        for number, (blocks,) in enumerate(self.chunks):
            with self.pool.lend(number * self.transfer.shard.nbytes, self.transfer.shard) as lease:
                for start, view in zip(starts, lease.views(), strict=True):
                    there = view.ctypes.data
                    pairs += [(start + i * page, there + place * page) for place, i in enumerate(blocks.block_ids)]
        return pairs


@contextmanager
def copies(block_tokens: int, chunk_count: int = 16) -> Iterator[Copies]:
    """Random bytes of `chunk_count` chunks in the shape of vLLM's CPU cache, and a pool; all of it touched."""
    per_chunk = CHUNK_TOKENS // block_tokens
    num_blocks = 1 + chunk_count * per_chunk * 3 // 2
    shape = (num_blocks, 8, block_tokens, TOKEN_NBYTES // 8)
    # allocated by torch, as an engine's cache is: a copy to NumPy's (16 bytes past a page) is 3 times slower
    layers = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(LAYERS)]
    caches = {f"layer {i}": layer for i, layer in enumerate(layers)}
    transfer = ReferenceTransfer([GroupCaches(caches, num_blocks, block_tokens, 0)], CHUNK_TOKENS)
    ids = random.Random(2).sample(range(1, num_blocks), chunk_count * per_chunk)
    chunks = [(Blocks(0, 0, tuple(ids[i : i + per_chunk])),) for i in range(0, len(ids), per_chunk)]
    region = Region.create(chunk_count * transfer.shard.nbytes)
    region.populate(0, region.nbytes)
    region.array[:] = 1
    pool = Pool(b"", region)
    try:
        yield Copies(pool, transfer, layers, chunks)
    finally:
        pool.close()


def copy_rows() -> list[Row]:
    """Gather and scatter, with and without sums, beside a memmove of each block of each layer."""
    made = []
    for block_tokens in (128, 16):
        with copies(block_tokens) as all_copies:
            made += block_size_rows(all_copies, "" if block_tokens == 128 else f"-{block_tokens}")
    return made


def block_size_rows(all_copies: Copies, suffix: str) -> list[Row]:
    """The rows of one block size."""
    pieces = all_copies.pieces()
    nbytes = all_copies.transfer.shard.groups[0].layers[0].page_nbytes

    def rate(action: Callable[[], object], passes: int = 1) -> Measure:
        return lambda: passes * all_copies.gbytes / cpu_seconds(action)

    def out() -> None:
        for here, there in pieces:
            ctypes.memmove(there, here, nbytes)

    def back() -> None:
        for here, there in pieces:
            ctypes.memmove(here, there, nbytes)

    def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
        return lambda: (first(), second())[0]

    def gather() -> None:
        all_copies.gather(seal=False)

    def sealed() -> None:
        all_copies.gather(seal=True)

    pairs = [
        ("copy-vs-memmove", "each way", ">= 0.95", rate(both(gather, all_copies.scatter), 2), rate(both(out, back), 2)),
        ("copy-vs-memmove-gather", "out", "", rate(gather), rate(out)),
        ("copy-vs-memmove-scatter", "back", "", rate(all_copies.scatter), rate(back)),
        ("copy-with-sums-vs-memmove", "out", ">= 0.8", rate(sealed), rate(out)),
    ]
    made = []
    for name, way, goal, ours, theirs in pairs:
        case = Case(name + suffix, "GB/CPU s", f"memmove of each block, {way}", "higher", goal)
        made.append(case.row(*alternate(15, ours, theirs)))
    return [*made, checksum_row(sealed, suffix)]


def checksum_row(sealed: Callable[[], None], suffix: str) -> Row:
    """The share of a gather with sums that is spent in xxh3, taken where it happens: on bytes that were just copied."""
    real, spent_s = reference.xxhash.xxh3_128, 0.0

    class Timed:
        def __init__(self) -> None:
            self._inner = real()

        def update(self, data: memoryview) -> None:
            nonlocal spent_s
            start = time.thread_time()
            self._inner.update(data)
            spent_s += time.thread_time() - start

        def digest(self) -> bytes:
            return self._inner.digest()

    def measure() -> float:
        nonlocal spent_s
        spent_s = 0.0
        whole_s = cpu_seconds(sealed)
        return spent_s / whole_s

    with mock.patch.object(reference.xxhash, "xxh3_128", Timed):
        (shares,) = alternate(15, measure)
    return Case("checksum-share" + suffix, "share", "the whole gather with sums").row(shares, [1.0])


# ---- a step beside a busy store ------------------------------------------------------------------------------


def step_rows() -> list[Row]:
    """A step of small operations on core 0, beside a store that another process keeps busy and beside an idle one."""
    with shared_store() as path, load(path) as client:
        before = os.sched_getaffinity(0)
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {0})  # after the store has started: it may run where it likes
        try:
            step = engine_step()
            busy, idle = alternate(120, beside(client, signal.SIGCONT, step), beside(client, signal.SIGSTOP, step))
        finally:
            os.sched_setaffinity(0, before)
    return [Case("step-time-with-busy-store", "ms", "beside an idle store", goal="<= 1.03").row(busy, idle)]


def engine_step() -> Callable[[], object]:
    """About 8 ms of small operations: mostly Python and dispatch, as a decode step."""
    hidden, weights = torch.randn(8, 256), [torch.randn(256, 256) / 16 for _ in range(8)]

    def step(rounds: int) -> torch.Tensor:
        out = hidden
        for _ in range(rounds):
            for weight in weights:
                out = torch.nn.functional.rms_norm(torch.relu(out @ weight), (256,))
        return out

    step(5)
    rounds = max(1, round(0.008 / min(seconds(lambda: step(5)) / 5 for _ in range(20))))
    return lambda: step(rounds)


def beside(client: subprocess.Popen[bytes], state: signal.Signals, step: Callable[[], object]) -> Measure:
    """The mean of 12 steps in milliseconds while the client works or stands still."""

    def measure() -> float:
        client.send_signal(state)
        time.sleep(0.02)
        return seconds(lambda: [step() for _ in range(12)]) / 12 * 1e3

    return measure


@contextmanager
def shared_store() -> Iterator[Path]:
    """A store process at a socket in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-") as folder:
        path = Path(folder) / "store.sock"
        options = Config(pool_size=256 * CHUNK_NBYTES, log_level="error")
        command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={options.json()}"]
        with ended(subprocess.Popen(command)):
            joined(path).close()
            yield path


@contextmanager
def load(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that keeps the store busy; it does so as soon as it has said a word."""
    process = subprocess.Popen([sys.executable, str(HERE / "store_load.py"), str(path)], stdout=subprocess.PIPE)
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends a process of ours at the end of the block."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


GROUPS = {"lookup": lookup_rows, "copy": copy_rows, "step": step_rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_groups(GROUPS, "micro-benchmarks", __doc__)
