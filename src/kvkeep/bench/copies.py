"""Times the copies of `CacheEngine` beside a block-wise memmove.

It copies 2,048 tokens: 32 layers, K and V apart, blocks of 16 tokens of 32 KiB each, in random order. The yardstick
moves the same blocks of the same cache to and from memory of the same kind with ctypes.memmove. Knows nothing about how
rows are shown.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.bench.rows import Case, Row, alternate, seconds
from kvkeep.config import Config
from kvkeep.core.layout import ShardLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.doors.library.cache_engine import CacheAccess, CacheEngine
from kvkeep.doors.library.open import Model, identity_of
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.link import source_of
from kvkeep.memory.pool import Lease
from kvkeep.memory.region import Region
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.keys import Keys, Rotator
from kvkeep.transfer.transfer import Blocks, Transfer

CHUNK_TOKENS, BLOCK_TOKENS, LAYERS = 256, 16, 32
COPIED_TOKENS = 2048
PAGE_NBYTES = 32 << 10  # K, or V, of one block in one layer: 8 heads of 128, bf16
ELSEWHERE = 70_000  # the position to which a text is moved
Words = npt.NDArray[np.uint32]


def engine(transfer: Transfer, pool_chunks: int, groups: list[GroupCaches]) -> CacheEngine:
    """An engine whose pool has room for so many chunks; it waits long rather than miss on a busy machine."""
    config = Config(
        pool_size=pool_chunks * transfer.shard.nbytes, deadline_s=30.0, transfer_mode="layerwise", log_level="error"
    )
    source = source_of(config, transfer.shard.nbytes, CHUNK_TOKENS)
    keys = Keys("2bthd", frequencies({"rope_theta": 500_000.0}, 128, Span(8192)))
    names = [name for group in groups for name in group.caches]
    copies = CpuCopies(transfer, mode=CopyMode("layerwise", possible=False))
    access = CacheAccess(copies, rotator=Rotator(groups, transfer.shard, dict.fromkeys(names, keys)))
    return CacheEngine(access, identity_of(Model("bench"), groups, CHUNK_TOKENS), source, config)


def fresh(random_: np.random.Generator, count: int) -> Words:
    """A prompt that nobody has seen."""
    return random_.integers(0, 150_000, count, dtype=np.uint32)


@dataclass
class NoSums:
    """`inner`, but a gather's sums are zeros: what the sums cost is the difference."""

    inner: Transfer

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self.inner.shard

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`, without sums."""
        self.inner.gather(blocks, lease, False, layers)
        return bytes(SUM_NBYTES * len(self.shard.chosen(layers)))

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`, verifying nothing."""
        return self.inner.scatter(lease, blocks, b"", layers)

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        self.inner.check(blocks, unique)


@dataclass
class CopyBench:
    """A cache full of random bytes, two engines over it (with and without sums), and memory for the yardstick."""

    engines: dict[str, CacheEngine]
    tables: tuple[list[npt.NDArray[np.intp]], list[npt.NDArray[np.intp]]]
    moves: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    tokens: Words
    numbers: np.random.Generator

    def rate(self, action: Callable[[], int]) -> float:
        """GB/s of an action that moves all of the prompt."""

        def checked() -> None:
            done = action()
            assert done == COPIED_TOKENS, f"{done} tokens"

        return COPIED_TOKENS * 2 * LAYERS * PAGE_NBYTES / BLOCK_TOKENS / 1e9 / seconds(checked)

    def store(self, which: str, layerwise: bool) -> float:
        """A prompt that nobody has seen."""
        engine, new = self.engines[which], fresh(self.numbers, COPIED_TOKENS)

        def action() -> int:
            if not layerwise:
                return engine.store(new, self.tables[0])
            before = engine.figures.count("stored_tokens")
            for _ in engine.store_layer(new, self.tables[0]):
                pass
            return engine.figures.count("stored_tokens") - before

        return self.rate(action)

    def retrieve(self, layerwise: bool, at: int = 0) -> float:
        """The prompt, into other blocks than it came from."""
        engine = self.engines[""]
        engine.store(self.tokens, self.tables[0])  # stores of others may have displaced it

        def action() -> int:
            if not layerwise:
                return int(engine.retrieve(self.tokens, self.tables[1], at=at).sum())
            *_, mask = engine.retrieve_layer(self.tokens, self.tables[1], at=at)
            assert isinstance(mask, np.ndarray)
            return int(mask.sum())

        return self.rate(action)

    def memmove(self, out: bool) -> float:
        """The yardstick, out of the cache or into it."""
        pairs = self.moves[0 if out else 1]

        def action() -> int:
            move = ctypes.memmove
            for to, source in pairs:
                move(to, source, PAGE_NBYTES)
            return COPIED_TOKENS

        return self.rate(action)


@contextmanager
def bench() -> Iterator[CopyBench]:
    """Everything allocated and touched."""
    per_prompt = COPIED_TOKENS // BLOCK_TOKENS
    num_blocks = 1 + 2 * per_prompt
    shape = (2, num_blocks, BLOCK_TOKENS, 8, 128)
    layers = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16) for _ in range(LAYERS)]
    groups = [GroupCaches({f"layer {n}": cache for n, cache in enumerate(layers)}, num_blocks, BLOCK_TOKENS, 0)]
    transfer = ReferenceTransfer(groups, CHUNK_TOKENS)
    ids = np.random.default_rng(2).permutation(np.arange(1, num_blocks))
    tables = ([ids[:per_prompt]], [ids[per_prompt:]])
    pool_chunks = 3 * COPIED_TOKENS // CHUNK_TOKENS
    engines = {
        name: engine(made, pool_chunks, groups) for name, made in (("", transfer), ("-no-sums", NoSums(transfer)))
    }
    numbers = np.random.default_rng(3)
    region = Region.create(pool_chunks * transfer.shard.nbytes)
    region.populate(0, region.nbytes)
    region.array[:] = 1
    try:
        for library in engines.values():
            for _ in range(4):  # every page of the pool has been touched after these
                library.store(fresh(numbers, COPIED_TOKENS), tables[0])
        moves = moved(layers, tables[0][0], region, transfer.shard), moved(layers, tables[1][0], region, transfer.shard)
        back = [(there, here) for here, there in moves[1]]
        yield CopyBench(engines, tables, (moves[0], back), fresh(numbers, COPIED_TOKENS), numbers=numbers)
    finally:
        for library in engines.values():
            library.close()
        region.close()


def moved(
    layers: list[torch.Tensor], ids: npt.NDArray[np.intp], region: Region, shard: ShardLayout
) -> list[tuple[int, int]]:
    """The addresses (memory, cache) of every page, in the order in which a bulk store copies them."""
    base, per_chunk, pairs = region.array.ctypes.data, shard.blocks(0), []
    for number in range(len(ids) // per_chunk):
        chunk = ids[number * per_chunk : (number + 1) * per_chunk].tolist()
        for range_, layer in zip(shard.ranges, layers, strict=True):
            there = base + number * shard.nbytes + range_.offset
            for part in (layer[0].data_ptr(), layer[1].data_ptr()):
                pairs += [(there + n * PAGE_NBYTES, part + i * PAGE_NBYTES) for n, i in enumerate(chunk)]
                there += per_chunk * PAGE_NBYTES
    return pairs


def copy_rows(runs: int, layerwise: bool) -> list[Row]:
    """Store and retrieve of a prompt of 2,048 tokens, each beside the same blocks' memmove."""
    name, goal = ("layerwise", ">= 0.9") if layerwise else ("bulk", ">= 1.0")
    with bench() as made:
        cases: list[tuple[str, str, Callable[[], float], Callable[[], float]]] = [
            (f"{name}-store", goal, lambda: made.store("", layerwise), lambda: made.memmove(True)),
            (f"{name}-retrieve", goal, lambda: made.retrieve(layerwise), lambda: made.memmove(False)),
            (f"{name}-retrieve-moved", "", lambda: made.retrieve(layerwise, ELSEWHERE), lambda: made.memmove(False)),
            (f"{name}-store-no-sums", "", lambda: made.store("-no-sums", layerwise), lambda: made.memmove(True)),
        ]
        return [
            Case(case, "GB/s", "memmove of each block", "higher", goal=asked).row(*alternate(runs, ours, theirs))
            for case, asked, ours, theirs in cases
        ]
