"""What every `Place` must do, as coroutines that a third party can call on its own: one case, one check.

A case makes an empty place with room for some MiB. Each check raises AssertionError with what is wrong and leaves the
place open; `CHECKS` are all of them. Then run `testing/suites/tiers.py` on a `RecordTier` over the place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.place import Get, Missing, Place, Put
from kvkeep.tiers.tier import Bytes

UNTOUCHED = 0xA5
Check = Callable[[Place], Awaitable[None]]


def bytes_of(seed: int, nbytes: int) -> Bytes:
    """Random bytes that belong to a seed, page-aligned."""
    octets = aligned_bytes(nbytes)
    octets[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return octets


async def kept(place: Place, name: str, nbytes: int) -> bytes | None:
    """What the place gives for a name, asked for so many bytes at most; None where nothing has it."""
    memory = np.full(nbytes + 2, UNTOUCHED, np.uint8)
    [got] = await place.get([Get(name, [memory[1:-1]])])
    assert memory[0] == memory[-1] == UNTOUCHED, "a get wrote outside its memory"
    if isinstance(got, Missing):
        assert got is Missing.ABSENT, "a place that works fails"
        return None
    assert 0 <= got <= nbytes, "more bytes than there is memory"
    assert (memory[1 + got :] == UNTOUCHED).all(), "a get wrote more bytes than it says"
    return memory[1 : 1 + got].tobytes()


async def check_round_trip(place: Place) -> None:
    """What was put is there, byte for byte, in order, also from several parts into several memories."""
    head, body = bytes_of(1, 4096), bytes_of(2, 3 * 4096)
    assert await place.put([Put("a/b", [head, body])]) == [True], "a place with room keeps nothing"
    assert await place.sizes(["a/b", "a/c"]) == [4 * 4096, 0]
    first, second = np.empty(100, np.uint8), np.empty(4 * 4096 - 100, np.uint8)
    assert await place.get([Get("a/b", [first, second])]) == [4 * 4096]
    assert first.tobytes() + second.tobytes() == head.tobytes() + body.tobytes(), "other bytes than were put"
    assert await kept(place, "a/c", 10) is None, "a name that was never put is there"


async def check_lengths(place: Place) -> None:
    """A name may have any number of bytes; a get of fewer is filled, a get of more says how many there were."""
    octets = bytes_of(1, 5001)
    await place.put([Put("odd", [octets[:1], octets[1:]])])
    assert await kept(place, "odd", 5001) == octets.tobytes()
    assert await kept(place, "odd", 17) == octets[:17].tobytes()
    assert await kept(place, "odd", 9000) == octets.tobytes(), "a get gives more bytes than the name has"
    assert await place.sizes(["odd"]) == [5001]


async def check_batches(place: Place) -> None:
    """A batch gets one answer each in its order, partial where it must be; an empty one gets none."""
    puts = [Put(f"batch/{number}", [bytes_of(number, 100 + number)]) for number in range(40)]
    assert await place.put(puts[::2]) == [True] * 20
    gets = [Get(put.name, [np.empty(200, np.uint8)]) for put in puts]
    for number, (get, put, got) in enumerate(zip(gets, puts, await place.get(gets), strict=True)):
        assert got == (Missing.ABSENT if number % 2 else 100 + number), "an answer is at another's place"
        assert number % 2 or get.into[0][: 100 + number].tobytes() == put.parts[0].tobytes(), "bytes of another name"
    sizes = await place.sizes([put.name for put in puts])
    assert sizes == [0 if number % 2 else 100 + number for number in range(40)]
    assert (await place.get([]), await place.put([]), await place.sizes([])) == ([], [], [])


async def check_replace(place: Place) -> None:
    """A put replaces what had the name, whole, also where it is shorter, and its memory may change afterwards."""
    long, short = bytes_of(1, 9000), bytes_of(2, 100)
    await place.put([Put("name", [long])])
    assert await place.put([Put("name", [short])]) == [True]
    wanted = short.tobytes()
    short[:] = 0
    assert await kept(place, "name", 9000) == wanted, "the rest of an earlier put, or memory that changed afterwards"


async def check_whole(place: Place) -> None:
    """Whoever reads while others write gets one put whole, never a part, nor a mixture."""
    nbytes = 64 << 10
    puts = [bytes_of(seed, nbytes) for seed in range(4)]
    await place.put([Put("hot", [puts[0]])])
    whole = {put.tobytes() for put in puts}
    writers = [asyncio.create_task(place.put([Put("hot", [put[:10], put[10:]])])) for put in puts for _ in range(4)]
    while not all(writer.done() for writer in writers):
        assert await kept(place, "hot", nbytes) in whole, "a part of a put, or a mixture of two"
        await asyncio.sleep(0)
    for writer in writers:
        await writer
    assert await kept(place, "hot", nbytes) in whole, "a mixture of two puts"


async def check_delete(place: Place) -> None:
    """A deleted name is gone and can be put again; others stay; absent ones are no error."""
    await place.put([Put(f"d/{number}", [bytes_of(number, 10)]) for number in range(3)])
    await place.delete(["d/1", "absent", "d/1"])
    assert await place.sizes(["d/0", "d/1", "d/2"]) == [10, 0, 10]
    assert await kept(place, "d/1", 10) is None
    assert await place.put([Put("d/1", [bytes_of(7, 20)])]) == [True]
    assert await kept(place, "d/1", 99) == bytes_of(7, 20).tobytes()


async def check_names(place: Place) -> None:
    """All names with a prefix are listed once, and no others; a prefix may end anywhere in a name."""
    wanted = {f"{'ab' * 16}/{number:02x}/{number:064x}" for number in range(50)}
    await place.put([Put(name, [bytes_of(1, 8)]) for name in [*wanted, "cd/1", "epochs"]])
    listed = [name async for name in place.names("ab" * 16 + "/")]
    assert sorted(listed) == sorted(wanted), "names are missing, listed twice, or of another prefix"
    assert {name async for name in place.names("")} == wanted | {"cd/1", "epochs"}
    assert [name async for name in place.names("c")] == ["cd/1"]
    assert [name async for name in place.names("none")] == []


async def check_cancel(place: Place) -> None:
    """Memory of a cancelled verb is not touched any more, and the place goes on."""
    octets = bytes_of(1, 64 << 10)
    await place.put([Put("there", [octets])])
    into = aligned_bytes(octets.nbytes)
    fresh = bytes_of(2, 64 << 10)
    wanted = fresh.tobytes()
    tasks = [
        asyncio.create_task(_ended(place.get([Get("there", [into])]))),
        asyncio.create_task(_ended(place.put([Put("fresh", [fresh])]))),
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    into[:] = UNTOUCHED
    fresh[:] = 0
    assert await kept(place, "there", octets.nbytes) == octets.tobytes()
    assert await kept(place, "fresh", octets.nbytes) in (None, wanted), "it was put from later bytes"
    assert (into == UNTOUCHED).all(), "a cancelled get wrote"


async def check_end(place: Place) -> None:
    """Ending twice is as good as once."""
    await place.put([Put("name", [bytes_of(1, 10)])])
    await place.aclose()
    await place.aclose()


async def _ended(call: Awaitable[object]) -> None:
    await call


CHECKS: tuple[Check, ...] = (
    check_round_trip,
    check_lengths,
    check_batches,
    check_replace,
    check_whole,
    check_delete,
    check_names,
    check_cancel,
    check_end,
)
