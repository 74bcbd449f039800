"""One pool for models with chunks of different sizes, on a real trace: what eviction leaves unused between the chunks."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import pytest

from kvkeep.core.allocator import Allocator, FreeList
from kvkeep.core.index import NO_ROOM, Index, IndexEntry
from kvkeep.core.policies.queue import lru

TRACE = Path(__file__).parents[1] / "data" / "mooncake_conversation_500.txt.gz"
PAGE = 4096
POOL_NBYTES = 500 << 20
SIZES = [(256, 256), (256, 205), (256, 90), (256, 22), (103, 61, 17)]  # pages of each model's chunks


class Outcome(NamedTuple):
    """Chunks that were found, refusals, evictions, and the least share of the pool in use once it had been full."""

    hits: int
    refused: int
    evictions: int
    least_used: float


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    with gzip.open(TRACE, "rt") as lines:
        return [[int(block) for block in line.split()] for line in lines]


def replayed(allocator: Allocator, pages: tuple[int, ...], requests: list[list[int]]) -> Outcome:
    """The requests of as many models in turn, each pinned while what it lacks is stored."""
    index = Index(allocator, lru())
    hits = refused = 0
    used: list[float] = []
    for number, blocks in enumerate(requests):
        model = number % len(pages)
        keys = [bytes([model]) * 16 + block.to_bytes(32, "big") for block in blocks]
        run = index.pin_prefix(keys)
        got = index.reserve(keys[len(run) :], pages[model] * PAGE, owner=1)
        for entry in got:
            if isinstance(entry, IndexEntry):
                index.commit(entry, b"sums")
        index.unpin(run)
        hits, refused = hits + len(run), refused + got.count(NO_ROOM)
        if index.stats().evictions:
            used.append(allocator.used_nbytes / POOL_NBYTES)
    assert index.check() == ""
    return Outcome(hits, refused, index.stats().evictions, min(used))


@pytest.mark.parametrize("pages", SIZES)
def test_chunks_of_several_sizes_share_a_pool_without_a_refusal(pages, requests):
    outcome = replayed(FreeList(POOL_NBYTES), pages, requests)
    assert outcome.refused == 0
    assert outcome.evictions > 1000, "the trace does not press on the pool"
    assert outcome.least_used > (0.99 if len(set(pages)) == 1 else 0.8)
