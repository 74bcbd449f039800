"""Which copies `CacheEngine` makes and which it does not, and what is left when one raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from kvkeep.core.layout import ShardLayout
from kvkeep.doors.library.cache_engine import CacheEngine
from kvkeep.memory.pool import Lease
from kvkeep.transfer.transfer import Blocks, Transfer

from .library import Library, flash_attention, group, library

HERE, THERE = [list(range(1, 9))], [list(range(79, 71, -1))]
TOKENS, LAYERS = range(32), 2  # four chunks


@dataclass
class Counting:
    """`inner`, its copies counted; the one with number `raises_at` raises instead."""

    inner: Transfer
    calls: int = 0
    raises_at: int = -1

    @property
    def shard(self) -> ShardLayout:
        return self.inner.shard

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        self._count()
        return self.inner.gather(blocks, lease, seal, layers)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        self._count()
        return self.inner.scatter(lease, blocks, sums, layers)

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        self.inner.check(blocks, unique)

    def _count(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if number == self.raises_at:
            raise OSError("the device is gone")


@pytest.fixture
def counting() -> list[Counting]:
    return []


@pytest.fixture
def lib(counting: list[Counting]) -> Iterator[Library]:
    def wrap(inner: Transfer) -> Transfer:
        counting.append(Counting(inner))
        return counting[0]

    with library([group(flash_attention, LAYERS)], wrap=wrap, transfer_mode="layerwise") as made:
        made.fill(1)
        yield made


def store(engine: CacheEngine) -> int:
    return engine.store(TOKENS, HERE)


def store_layer(engine: CacheEngine) -> int:
    before = engine.figures.count("stored_tokens")
    for _ in engine.store_layer(TOKENS, HERE):
        pass
    return engine.figures.count("stored_tokens") - before


def retrieve(engine: CacheEngine) -> int:
    return int(engine.retrieve(TOKENS, THERE).sum())


def retrieve_layer(engine: CacheEngine) -> int:
    *_, mask = engine.retrieve_layer(TOKENS, THERE)
    return int(mask.sum())


Verb = Callable[[CacheEngine], int]


@pytest.mark.parametrize(("verb", "copies"), [(store, 4), (store_layer, 4 * LAYERS)])
def test_what_is_present_is_not_read_again(lib: Library, counting: list[Counting], verb: Verb, copies: int):
    assert (verb(lib.engine), counting[0].calls) == (32, copies)
    assert (verb(lib.engine), counting[0].calls) == (0, copies)
    assert lib.engine.figures.count("skipped_present_chunks") == 4


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("verb", [store, store_layer])
def test_a_store_whose_copy_raises_keeps_nothing(lib: Library, counting: list[Counting], verb: Verb, at: int):
    counting[0].raises_at = at
    with pytest.raises(OSError, match="device"):
        verb(lib.engine)
    assert lib.settled()["chunks"] == 0
    assert verb(lib.engine) == 32, "its chunks can be stored again at once"


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("verb", [retrieve, retrieve_layer])
def test_a_retrieve_whose_copy_raises_holds_nothing(lib: Library, counting: list[Counting], verb: Verb, at: int):
    store(lib.engine)
    counting[0].raises_at = counting[0].calls + at
    with pytest.raises(OSError, match="device"):
        verb(lib.engine)
    assert lib.settled()["chunks"] == 4
    assert verb(lib.engine) == 32


def test_a_salt_holds_layer_by_layer_too(lib: Library):
    for _ in lib.engine.store_layer(TOKENS, HERE, extra=("tenant", "a")):
        pass
    for extra, arrives in ((None, 0), (("tenant", "b"), 0), (("tenant", "a"), 32)):
        announced, *_, mask = lib.engine.retrieve_layer(TOKENS, THERE, extra=extra)
        assert (announced, mask.sum(), lib.engine.lookup(TOKENS, extra=extra)) == (arrives, arrives, arrives)


def test_a_pin_holds_whole_chunks_of_a_partly_present_prompt_and_gives_all_of_them_back(lib: Library):
    lib.engine.store(TOKENS[:16], HERE)
    chunk_nbytes = lib.settled()["used_nbytes"] // 2
    assert lib.engine.lookup(TOKENS, "request") == 16
    assert lib.engine.store_figures()["pinned_nbytes"] == 2 * chunk_nbytes
    lib.engine.unpin("request")
    lib.settled()
