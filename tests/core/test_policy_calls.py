"""What a policy learns from the pool's index and from the disk's ledger: sizes, uses and misses."""

from __future__ import annotations

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index, IndexEntry
from kvkeep.core.policies.policy import UNKNOWN_COST
from kvkeep.core.policies.queue import Queue
from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.tiers.disk.ledger import Ledger

A, B, C = (bytes([letter]) * 48 for letter in b"abc")


class NotedQueue:
    """LRU that notes what it is told."""

    def __init__(self) -> None:
        self.queue = Queue(touch_moves=True)
        self.noted: list[tuple[object, ...]] = []

    def insert(self, key: bytes, nbytes: int, cost: float) -> None:
        self.noted.append(("insert", key, nbytes, cost))
        self.queue.insert(key, nbytes, cost)

    def touch(self, key: bytes) -> None:
        self.noted.append(("touch", key))
        self.queue.touch(key)

    def missed(self, key: bytes) -> None:
        self.noted.append(("missed", key))

    def remove(self, key: bytes) -> None:
        self.queue.remove(key)

    def set_hidden(self, key: bytes, hidden: bool) -> None:
        self.queue.set_hidden(key, hidden)

    def evict(self) -> bytes | None:
        return self.queue.evict()


def test_the_index_says_what_a_chunk_takes_and_where_a_lookup_ended():
    policy = NotedQueue()
    index = Index(FreeList(8 * ALIGN_NBYTES), policy)
    for entry in index.reserve([A, B], ALIGN_NBYTES + 1, owner=1):
        assert isinstance(entry, IndexEntry)
        index.commit(entry, b"sums")
    size = 2 * ALIGN_NBYTES
    assert policy.noted == [("insert", B, size, UNKNOWN_COST), ("insert", A, size, UNKNOWN_COST)]
    policy.noted.clear()
    index.unpin(index.pin_prefix([A, B, C]))
    assert policy.noted == [("missed", C), ("touch", B), ("touch", A)]


def test_a_chunk_that_is_being_written_is_no_miss():
    policy = NotedQueue()
    index = Index(FreeList(8 * ALIGN_NBYTES), policy)
    index.reserve([A], ALIGN_NBYTES, owner=1)
    policy.noted.clear()
    assert index.pin_prefix([A, B]) == []
    assert policy.noted == []


def test_the_ledger_says_what_a_record_takes_and_what_was_missed():
    policy = NotedQueue()
    ledger = Ledger(10 * ALIGN_NBYTES, policy, 0, settled=True)
    assert ledger.reserve(3 * ALIGN_NBYTES)
    entry = ledger.publish(A, 3 * ALIGN_NBYTES, 2 * ALIGN_NBYTES)
    ledger.touch(entry)
    ledger.missed(B)
    assert policy.noted == [("insert", A, 2 * ALIGN_NBYTES, UNKNOWN_COST), ("touch", A), ("missed", B)]
