"""Times keys, the allocator and the eviction policy: `kvkeep bench keys alloc policy`.

Every measure is CPU time of one thread. Knows nothing about how rows are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise, repeat

import numpy as np

from kvkeep.bench.rows import Case, Row, alternate, cpu_seconds, expect
from kvkeep.core import cbor
from kvkeep.core.allocator import Allocator, FreeList
from kvkeep.core.index import Index, IndexEntry
from kvkeep.core.key import Chain, none_hash
from kvkeep.core.policies.queue import lru

CHUNK_TOKENS = 256
PROMPT_TOKENS = 131_072
VOCABULARY = 128_000
PAGE = 4096
HOLES = 8192
ROUNDS = 2000
ENTRIES = 100_000
SUMS = bytes(16)


def key_rows(runs: int) -> list[Row]:
    """The digests of a long prompt, and of one more chunk of it, beside SHA-256 of the bytes that are hashed."""
    words = np.random.default_rng(3).integers(0, VOCABULARY, PROMPT_TOKENS + CHUNK_TOKENS, dtype=np.uint32)
    whole = words[:PROMPT_TOKENS]
    octets, offsets = cbor.encode_uints(whole, CHUNK_TOKENS)
    view, head = octets.data, b"\x83\x58\x20"

    def hashing(chunks: int) -> None:
        parent = none_hash()
        for start, end in pairwise(offsets[: chunks + 1]):
            hasher = sha256(head + parent)
            hasher.update(view[start:end])
            parent = hasher.digest()

    def extended() -> float:
        chain = Chain(CHUNK_TOKENS, none_hash())
        chain.extend(whole)
        return 1e6 * cpu_seconds(lambda: chain.extend(words))

    def rate(action: Callable[[], object]) -> Callable[[], float]:
        return lambda: PROMPT_TOKENS / cpu_seconds(action) / 1e6

    made = []
    everything = PROMPT_TOKENS // CHUNK_TOKENS
    for name, tokens, goal in (("keys-array", whole, ">= 60 Mtok/s"), ("keys-list", whole.tolist(), ">= 25 Mtok/s")):
        case = Case(name, "Mtok/s", "SHA-256 of the same bytes", "higher", goal=goal)
        ours = rate(lambda tokens=tokens: Chain(CHUNK_TOKENS, none_hash()).extend(tokens))  # type: ignore[misc]
        made.append(case.row(*alternate(runs, ours, rate(lambda: hashing(everything)))))
    case = Case("keys-one-more-chunk", "us", "SHA-256 of a chunk")
    return [*made, case.row(*alternate(runs, extended, lambda: 1e6 * cpu_seconds(lambda: hashing(1))))]


def alloc_rows(runs: int) -> list[Row]:
    """One allocate and free, beside one entry put into a dict and taken out again."""
    draw = np.random.default_rng(5)
    sizes = [PAGE * int(size) for size in draw.integers(1, 512, ROUNDS)]
    holes, full = with_holes(), with_holes()
    cases: list[tuple[str, str, Callable[[], None]]] = [
        ("freelist", "<= 4 us", cycle(FreeList(1 << 40), sizes)),
        ("freelist-holes", "<= 4 us", cycle(holes, sizes)),
        ("freelist-fail", "<= 5 us", failing(full, 1 << 40)),
    ]
    return [
        Case(name, "us", "set and pop in a dict", goal=goal).row(
            *alternate(runs, each(action, ROUNDS), each(dict_cycle, ROUNDS))
        )
        for name, goal, action in cases
    ]


def policy_rows(runs: int) -> list[Row]:
    """Evict one and insert one in an index of 100,000, the older half pinned, beside the same with none pinned."""
    pinned, free = filled(ENTRIES), filled(ENTRIES)
    pinned.pin_prefix(list(keys(0, ENTRIES // 2)))
    case = Case("evict-pinned", "us", "the same, none pinned", goal="<= 10 us")
    return [case.row(*alternate(runs, churning(pinned), churning(free)))]


def keys(first: int, end: int) -> list[bytes]:
    """Keys of one namespace that look like digests, the same for the same numbers."""
    return [bytes(16) + sha256(number.to_bytes(8, "big")).digest() for number in range(first, end)]


def filled(count: int) -> Index:
    """A full index of `count` committed entries of a page each."""
    index = Index(FreeList(count * PAGE), lru())
    for first in range(0, count, 500):
        store(index, keys(first, min(first + 500, count)))
    return index


def store(index: Index, wanted: list[bytes]) -> None:
    """Reserve and commit what is absent, and fits."""
    got = index.reserve(wanted, PAGE, owner=1)
    for entry in got:
        if isinstance(entry, IndexEntry):
            index.commit(entry, SUMS)


def each(action: Callable[[], object], count: int) -> Callable[[], float]:
    """Microseconds of one of the `count` things that `action` does."""
    return lambda: 1e6 * cpu_seconds(action) / count


def with_holes() -> FreeList:
    """A free list with 8,192 holes of 512 random sizes, none beside another."""
    draw = np.random.default_rng(6)
    free_list = FreeList(1 << 40)
    extents = [free_list.allocate(PAGE * int(size)) for size in draw.integers(1, 513, 2 * HOLES)]
    free_list.allocate(free_list.free_nbytes)
    for extent in extents[1::2]:
        assert extent is not None
        free_list.free(extent)
    return free_list


def cycle(allocator: Allocator, sizes: list[int]) -> Callable[[], None]:
    """Allocate each size and free it at once."""

    def action() -> None:
        for size in sizes:
            extent = allocator.allocate(size)
            assert extent is not None
            allocator.free(extent)

    return action


def failing(allocator: Allocator, nbytes: int) -> Callable[[], None]:
    """Ask for what no hole has room for."""

    def action() -> None:
        for size in repeat(nbytes, ROUNDS):
            extent = allocator.allocate(size)  # not within the assert: python -O would measure nothing
            assert extent is None

    return action


def dict_cycle() -> None:
    """The yardstick of an allocator."""
    held: dict[int, int] = {}
    for number in range(ROUNDS):
        held[number] = number
        held.pop(number)


def churning(index: Index) -> Callable[[], float]:
    """Store new chunks one by one in an index that is full. Microseconds each; making their keys is not in it."""
    number = ENTRIES

    def measure() -> float:
        nonlocal number
        before = index.stats().evictions
        wanted = [[key] for key in keys(number, number + ROUNDS)]
        number += ROUNDS

        def action() -> None:
            for key in wanted:
                store(index, key)

        spent_s = cpu_seconds(action)
        expect(index.stats().evictions == before + ROUNDS, "each store evicts a chunk")
        return 1e6 * spent_s / ROUNDS

    return measure
