"""The policies beside libCacheSim's on a real trace: not only how many hits, but who is evicted when."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import libcachesim
import pytest

from kvkeep.core.policies.policy import EvictionPolicy
from kvkeep.core.policies.queue import fifo, lru
from kvkeep.core.policies.ranked import lfu, mru

TRACE = Path(__file__).parents[1] / "data" / "mooncake_conversation_500.txt.gz"
CAPACITIES = [50, 500, 3000]  # of 11,879 blocks

Step = tuple[int, int | None]  # the block that was asked for, and the one that had to go for it


@pytest.fixture(scope="module")
def trace() -> list[int]:
    with gzip.open(TRACE, "rt") as lines:
        return [int(block) for line in lines for block in line.split()]


def ours(make: Callable[[], EvictionPolicy], capacity: int, trace: list[int]) -> Iterator[Step]:
    policy, held = make(), set()
    for block in trace:
        key, victim = block.to_bytes(48, "big"), None
        if key in held:
            policy.touch(key)
            continue
        if len(held) == capacity:
            victim = policy.evict()
            held.remove(victim)
        policy.insert(key, 1, 1.0)
        held.add(key)
        yield block, None if victim is None else int.from_bytes(victim, "big")


def theirs(make: type[libcachesim.CacheBase], capacity: int, trace: list[int]) -> Iterator[Step]:
    cache = make(capacity, hashpower=14)
    for time, block in enumerate(trace):
        request, victim = libcachesim.Request(), None
        request.obj_id, request.obj_size, request.clock_time = block + 1, 1, time  # 0 is no id there
        if cache.find(request, True) is not None:
            continue
        if cache.get_occupied_byte() == capacity:
            victim = cache.to_evict(request).obj_id - 1
            cache.evict(request)
        cache.insert(request)
        yield block, victim


def most_recent(capacity: int, trace: list[int]) -> Iterator[Step]:
    """MRU, which libCacheSim does not have: a list in the order of use."""
    held: list[int] = []
    for block in trace:
        victim = None
        if hit := block in held:
            held.remove(block)
        elif len(held) == capacity:
            victim = held.pop()
        held.append(block)
        if not hit:
            yield block, victim


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize(("policy", "peer"), [(fifo, libcachesim.FIFO), (lru, libcachesim.LRU), (lfu, libcachesim.LFU)])
def test_misses_and_victims_are_libcachesims(policy, peer, capacity, trace):
    steps = list(ours(policy, capacity, trace))
    assert steps == list(theirs(peer, capacity, trace))
    assert sum(victim is not None for _, victim in steps) > 10_000, "the trace does not press on the cache"


def test_mru_is_its_definition(trace):
    assert list(ours(mru, 50, trace)) == list(most_recent(50, trace))
