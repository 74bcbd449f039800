"""What every `Tier` must do, as coroutines that a third party can call on its own: one case, one check.

A case makes an empty tier of any kind, with room for some MiB. Each check raises
AssertionError with what is wrong, and leaves the tier open; `CHECKS` are all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
import xxhash

from kvkeep.core.key import key_of
from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.errors import TierUnavailable
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.tier import Bytes, Read, Stored, Tier, Write

SIZES = (ALIGN_NBYTES, 3 * ALIGN_NBYTES, 2 * ALIGN_NBYTES)
UNTOUCHED = 0xA5
Check = Callable[[Tier], Awaitable[None]]


def key(number: int, namespace: int = 1) -> bytes:
    """A key; its bytes are all over the place."""
    return key_of(bytes([namespace]) * 16, xxhash.xxh3_128_digest(bytes([number])) * 2)


def write_of(name: bytes, sizes: Sequence[int] = SIZES, seed: int = 0) -> Write:
    """A chunk of random bytes that belong to the key and the seed, with its right sums."""
    payload = aligned_bytes(sum(sizes))
    payload[:] = np.random.default_rng([seed, *name]).integers(0, 256, payload.nbytes, np.uint8)
    ends = np.cumsum(sizes)
    sums = b"".join(
        xxhash.xxh3_128_digest(payload[end - size : end].data) for size, end in zip(sizes, ends.tolist(), strict=True)
    )
    return Write(name, sizes, payload, sums)


def memory_for(name: bytes, sizes: Sequence[int] = SIZES) -> tuple[Read, Bytes]:
    """A read into the middle of memory that is otherwise a guard."""
    memory = aligned_bytes(sum(sizes) + 2 * ALIGN_NBYTES)
    memory[:] = UNTOUCHED
    return Read(name, sizes, memory[ALIGN_NBYTES:-ALIGN_NBYTES]), memory


async def holds(tier: Tier, write: Write) -> bool:
    """Whether the tier gives back exactly this chunk (True) or nothing (False); anything else is an AssertionError."""
    read, memory = memory_for(write.key, write.sizes)
    [sums] = await tier.load([read])
    assert (memory[:ALIGN_NBYTES] == UNTOUCHED).all(), "a load wrote before its memory"
    assert (memory[-ALIGN_NBYTES:] == UNTOUCHED).all(), "a load wrote behind its memory"
    if sums is None:
        return False
    assert sums == write.sums, "other sums than were stored"
    assert bytes(read.into) == bytes(write.payload), "other bytes than were stored"
    return True


async def check_round_trip(tier: Tier) -> None:
    """What was stored is there, byte for byte, its sums too; what was not is not. Unaligned memory will do."""
    writes = [write_of(key(number)) for number in range(5)]
    assert await tier.store(writes) == [Stored.STORED] * 5, "a tier with room refuses"
    assert await tier.contains([key(9), *(write.key for write in writes)]) == [False] + [True] * 5
    for write in writes:
        assert await holds(tier, write), "a stored chunk is not there"
    assert not await holds(tier, write_of(key(9))), "a chunk that was never stored is there"
    odd = np.zeros(sum(SIZES) + 1, np.uint8)[1:]
    odd[:] = writes[0].payload
    unaligned = writes[0]._replace(key=key(7), payload=odd)
    assert await tier.store([unaligned]) == [Stored.STORED], "payload that begins anywhere is refused"
    into = np.zeros(sum(SIZES) + 1, np.uint8)[1:]
    assert await tier.load([Read(key(7), SIZES, into)]) == [unaligned.sums], "memory that begins anywhere is not filled"
    assert bytes(into) == bytes(odd), "other bytes than were stored"


async def check_batches(tier: Tier) -> None:
    """A batch gets one answer each in its order, partial where it must be; an empty one gets none."""
    writes = [write_of(key(number), (ALIGN_NBYTES,) * (1 + number % 3)) for number in range(40)]
    await tier.store(writes[::2])
    reads = [memory_for(write.key, write.sizes)[0] for write in writes]
    sums = await tier.load(reads)
    for number, (write, read, got) in enumerate(zip(writes, reads, sums, strict=True)):
        assert (got is None) == bool(number % 2), "an answer is at another's place"
        assert got is None or bytes(read.into) == bytes(write.payload), "bytes are at another's place"
    assert (await tier.load([]), await tier.store([]), await tier.contains([])) == ([], [], [])


async def check_gone(tier: Tier) -> None:
    """Only of a chunk that is not there is it told that no record of it is, and not of one that is bad."""
    writes = [write_of(key(number)) for number in range(2)]
    await tier.store([writes[0], writes[1]._replace(sums=bytes(len(writes[1].sums)))])
    told: set[int] = set()
    reads = [memory_for(key(number))[0]._replace(gone=partial(told.add, number)) for number in range(3)]
    assert await tier.load(reads) == [writes[0].sums, None, None]
    assert told <= {2}, "a chunk that is there is told to be gone"


async def check_progress(tier: Tier) -> None:
    """A load that is to tell what has arrived tells only of verified bytes in their place, and never goes back."""
    sizes = (ALIGN_NBYTES, 40 * ALIGN_NBYTES, 2 * ALIGN_NBYTES, 33 * ALIGN_NBYTES)
    writes = [write_of(key(number), sizes) for number in range(7)]
    bad = writes[3].sums[:16] + bytes(16) + writes[3].sums[32:]
    await tier.store([*writes[:3], writes[3]._replace(sums=bad), *writes[4:6]])
    told: list[list[int]] = [[] for _ in writes]
    reads = [memory_for(write.key, sizes)[0] for write in writes]

    def tell(number: int, ranges: int) -> None:
        end = sum(sizes[:ranges])
        right = reads[number].into[:end].tobytes() == writes[number].payload[:end].tobytes()
        told[number].append(ranges if right else -1)

    asked = [read._replace(arrived=partial(tell, number)) for number, read in enumerate(reads)]
    sums = await tier.load(asked)
    assert sums == [write.sums for write in writes[:3]] + [None] + [write.sums for write in writes[4:6]] + [None]
    for number, read in enumerate(reads):
        assert sums[number] is None or bytes(read.into) == bytes(writes[number].payload), "bytes are at another's place"
        assert told[number] == sorted(set(told[number])), "progress went back, or was told of other bytes"
        most = {3: 1, 6: 0}.get(number, len(sizes))
        assert all(0 < ranges <= most for ranges in told[number]), "told of what is not there, or not good"


async def check_present(tier: Tier) -> None:
    """A good record is kept, whatever comes after it, also within one batch and from two writers at once."""
    first, second = write_of(key(1)), write_of(key(1), seed=1)
    assert await tier.store([first, second]) == [Stored.STORED, Stored.PRESENT], "a key twice in a batch"
    assert await tier.store([second]) == [Stored.PRESENT]
    assert await holds(tier, first), "a good record was replaced"
    both = await asyncio.gather(*(tier.store([write_of(key(2))]) for _ in range(2)))
    assert sorted(outcome.value for [outcome] in both) == ["present", "stored"], "two writers of a key"


async def check_wrong_bytes(tier: Tier) -> None:
    """What does not match its sums, or is asked for in another shape, is never given back, and makes way."""
    good = write_of(key(1))
    bad = good._replace(sums=bytes(len(good.sums)))
    await tier.store([bad])
    assert await tier.load([memory_for(key(1))[0]]) == [None], "bytes that do not match their sums"
    assert await tier.store([good]) == [Stored.STORED], "the key of a bad record cannot be stored again"
    assert await holds(tier, good)
    other = tuple(reversed(SIZES))
    assert await tier.load([memory_for(key(1), other)[0]]) == [None], "a chunk of another shape"


async def check_delete(tier: Tier) -> None:
    """A deleted chunk is gone, can be stored again, and others stay; absent ones are no error."""
    writes = [write_of(key(number)) for number in range(3)]
    await tier.store(writes)
    await tier.delete([key(1), key(77), key(1)])
    assert [await holds(tier, write) for write in writes] == [True, False, True]
    assert await tier.contains([key(1)]) == [False]
    assert await tier.store([writes[1]]) == [Stored.STORED]
    assert await holds(tier, writes[1])


async def check_clear(tier: Tier) -> None:
    """A cleared namespace is empty and can be filled again; others are not touched; None is all of them."""
    ours, theirs = write_of(key(1)), write_of(key(1, namespace=2))
    await tier.store([ours, theirs])
    await tier.clear(ours.key[:16])
    assert (await holds(tier, ours), await holds(tier, theirs)) == (False, True)
    assert await tier.store([ours]) == [Stored.STORED]
    await tier.clear(None)
    assert (await holds(tier, ours), await holds(tier, theirs)) == (False, False)
    assert await tier.contains([ours.key, theirs.key]) == [False, False]
    assert await tier.store([theirs]) == [Stored.STORED]
    assert await holds(tier, theirs)


async def check_clear_races(tier: Tier) -> None:
    """What was being written when a clear began is not found after it, nor is it given to a load that began before."""
    writes = [write_of(key(number)) for number in range(8)]
    await tier.store(writes[:4])
    loads = [asyncio.create_task(tier.load([memory_for(write.key)[0]])) for write in writes[:4]]
    stores = asyncio.create_task(tier.store(writes[4:]))
    for _ in range(3):
        await asyncio.sleep(0)
    await tier.clear(None)
    stored = await stores
    for load in loads:
        await load  # their bytes may have come before the clear
    assert [await holds(tier, write) for write in writes[:4]] == [False] * 4
    late = [await holds(tier, write) for write in writes[4:]]
    assert not any(there for there, answer in zip(late, stored, strict=True) if answer is not Stored.STORED)


async def check_cancel(tier: Tier) -> None:
    """Memory of a cancelled verb is not touched any more, and the tier goes on."""
    writes = [write_of(key(number)) for number in range(8)]
    await tier.store(writes)
    pairs = [memory_for(write.key) for write in writes]
    again = [write_of(key(number), seed=1) for number in range(8, 16)]
    tasks = [
        asyncio.create_task(_ignored(tier.load([read for read, _ in pairs]))),
        asyncio.create_task(_ignored(tier.store(again))),
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for _, memory in pairs:
        memory[:] = UNTOUCHED
    for write in again:
        write.payload[:] = 0
    assert all([await holds(tier, write) for write in writes])
    assert all((memory == UNTOUCHED).all() for _, memory in pairs), "a cancelled load wrote"
    for number, write in zip(range(8, 16), again, strict=True):
        assert await holds(tier, write_of(write.key, seed=1)) in (False, True), (
            f"chunk {number} was written from later bytes"
        )


async def check_end(tier: Tier) -> None:
    """After the end every verb is a TierUnavailable, and ending again does nothing."""
    await tier.aclose()
    await tier.aclose()
    write = write_of(key(1))
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "contains": lambda: tier.contains([write.key]),
        "load": lambda: tier.load([memory_for(write.key)[0]]),
        "store": lambda: tier.store([write]),
        "delete": lambda: tier.delete([write.key]),
        "clear": lambda: tier.clear(None),
    }
    for verb, call in calls.items():
        failure: TierUnavailable | None = None
        try:
            await call()
        except TierUnavailable as error:
            failure = error
        assert failure is not None, f"{verb} works after the end"
        assert failure.tier, "an error does not name its tier"
        assert failure.operation == verb, "an error does not name what was asked"
        assert not failure.retryable, "a tier that has ended never works again"


async def _ignored(call: Awaitable[object]) -> None:
    await call


CHECKS: tuple[Check, ...] = (
    check_round_trip,
    check_batches,
    check_gone,
    check_progress,
    check_present,
    check_wrong_bytes,
    check_delete,
    check_clear,
    check_clear_races,
    check_cancel,
    check_end,
)
