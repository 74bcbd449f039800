"""The tier over a place: what a fault, a crash or a race in the place makes of its records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from kvkeep.errors import TierError, TierUnavailable
from kvkeep.testing.doubles.codecs import ZlibCodec
from kvkeep.testing.doubles.memory_place import MemoryPlace
from kvkeep.testing.suites.tiers import holds, key, memory_for, write_of
from kvkeep.tiers.codec import Codec
from kvkeep.tiers.epochs import decode_epochs
from kvkeep.tiers.place import Get, Missing, Put
from kvkeep.tiers.record import record_name
from kvkeep.tiers.record_tier import RecordTier, open_record_tier
from kvkeep.tiers.tier import Stored

WRITES = [write_of(key(number)) for number in range(4)]
NAMES = [record_name(write.key) for write in WRITES]
CODECS = pytest.mark.parametrize("codec", [None, ZlibCodec()], ids=["raw", "codec"])


@dataclass
class FaultyPlace:
    """A place in memory whose puts can be held or refused, and whose gets can fail, by name."""

    inner: MemoryPlace = field(default_factory=MemoryPlace)
    refused: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)  # cannot be deleted: TierUnavailable
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def sizes(self, names: Sequence[str]) -> list[int]:
        return await self.inner.sizes(names)

    async def get(self, gets: Sequence[Get]) -> list[int | Missing]:
        got = await self.inner.get(gets)
        if gets:
            await self.gate.wait()
        return [Missing.FAILED if get.name in self.failing else one for get, one in zip(gets, got, strict=True)]

    async def put(self, puts: Sequence[Put]) -> list[bool]:
        """Kept when it is asked, and again when the gate opens or the caller is cancelled."""
        allowed = [put for put in puts if put.name not in self.refused]
        kept = {put.name for put in allowed if (await self.inner.put([put]))[0]}
        if puts and puts[0].name != "epochs":
            try:
                await self.gate.wait()
            finally:
                await self.inner.put([put for put in allowed if put.name in kept])
        return [put.name in kept for put in puts]

    async def delete(self, names: Sequence[str]) -> None:
        if self.stuck.intersection(names):
            raise TierUnavailable("stuck")
        self.deleted += names
        await self.inner.delete(names)

    def names(self, prefix: str) -> AsyncIterator[str]:
        return self.inner.names(prefix)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def opened(place: Any, codec: Codec | None = None) -> RecordTier:
    clock = count(1)
    return await open_record_tier("memory", place, codec, lambda: next(clock))


async def there(tier: RecordTier) -> list[bool]:
    return [await holds(tier, write) for write in WRITES]


@CODECS
def test_no_changed_byte_is_given_back(run: Any, codec: Codec | None) -> None:
    async def test() -> None:
        place = MemoryPlace()
        tier = await opened(place, codec)
        await tier.store(WRITES[:1])
        good = place.kept[NAMES[0]]
        for at in range(0, len(good), 509):
            place.kept[NAMES[0]] = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
            assert not await holds(tier, WRITES[0]), at
            assert NAMES[0] not in place.kept, "what is bad is deleted"
        for nbytes in (0, 100, 4096, 8192, len(good) - 1):
            place.kept[NAMES[0]] = good[:nbytes]
            assert not await holds(tier, WRITES[0])
        place.kept[NAMES[1]] = good
        assert await there(tier) == [False] * 4, "a record under another name"
        place.kept[NAMES[0]] = good
        assert await there(tier) == [True, False, False, False]

    run(test)


@CODECS
def test_what_the_place_fails_to_give_stays(run: Any, codec: Codec | None) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place, codec)
        await tier.store(WRITES)
        place.failing = {NAMES[1]}
        gone: list[str] = []
        read = memory_for(WRITES[1].key)[0]._replace(gone=lambda: gone.append("gone"))
        assert await tier.load([read]) == [None]
        assert await there(tier) == [True, False, True, True]
        place.failing = set()
        assert await there(tier) == [True] * 4
        assert (gone, place.deleted) == ([], [])

    run(test)


@CODECS
def test_a_record_is_found_by_the_next_run(run: Any, codec: Codec | None) -> None:
    async def test() -> None:
        place = MemoryPlace()
        tier = await opened(place, codec)
        assert await tier.store(WRITES) == [Stored.STORED] * 4
        await tier.aclose()
        tier = await opened(place, codec)
        assert await there(tier) == [True] * 4
        assert await tier.store(WRITES) == [Stored.PRESENT] * 4

    run(test)


def test_what_a_crash_brings_back_after_a_clear_is_never_given(run: Any) -> None:
    async def test() -> None:
        place = MemoryPlace()
        tier = await opened(place)
        await tier.store(WRITES)
        before = dict(place.kept)
        await tier.clear(WRITES[0].key[:16])
        place.kept.update({name: before[name] for name in NAMES})
        assert await there(tier) == [False] * 4
        assert place.kept.keys() == {"epochs"}, "what is old is deleted when it is met"
        place.kept.update({name: before[name] for name in NAMES})
        assert await tier.store(WRITES[:2]) == [Stored.STORED] * 2, "an old record makes way"
        await tier.aclose()
        assert await there(await opened(place)) == [True, True, False, False]

    run(test)


def test_a_clear_that_a_crash_cut_short_is_carried_out_at_the_next_start(run: Any) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place)
        other = write_of(key(1, namespace=2))
        await tier.store([*WRITES, other])
        place.stuck = set(NAMES)
        with pytest.raises(TierUnavailable):
            await tier.clear(WRITES[0].key[:16])
        await tier.clear(b"n" * 16)
        assert decode_epochs(place.inner.kept["epochs"]).unsettled == {"01" * 16, b"n".hex() * 16}
        place.stuck = set()
        tier = await opened(place)
        assert place.inner.kept.keys() == {"epochs", record_name(other.key)}
        assert decode_epochs(place.inner.kept["epochs"]).unsettled == set()
        assert await holds(tier, other)

    run(test)


def test_a_clear_that_the_place_does_not_keep_says_so_and_holds_and_is_kept_later(run: Any) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place)
        await tier.store(WRITES)
        last = decode_epochs(place.inner.kept["epochs"]).last
        place.refused = {"epochs"}
        with pytest.raises(TierUnavailable, match="found again after a restart"):
            await tier.clear(None)
        assert await there(tier) == [False] * 4
        assert decode_epochs(place.inner.kept["epochs"]).last == last
        assert await tier.store(WRITES[:1]) == [Stored.STORED]
        place.refused = set()
        assert await tier.store(WRITES[1:]) == [Stored.STORED] * 3
        assert decode_epochs(place.inner.kept["epochs"]).last > last
        assert await there(tier) == [True] * 4

    run(test)


def test_a_put_of_epochs_that_is_late_does_not_undo_a_later_clear(run: Any) -> None:
    async def main() -> None:
        place = MemoryPlace()
        tier = await open_record_tier("place", place)
        gate, held, put, kept = asyncio.Event(), [True], place.put, []

        async def late(puts: Sequence[Put]) -> list[bool]:
            if held:
                held.clear()
                await gate.wait()
            answers = await put(puts)
            kept.append(set(decode_epochs(bytes(puts[0].parts[0])).namespaces))
            return answers

        place.put = late  # type: ignore[method-assign]
        clears = [asyncio.ensure_future(tier.clear(namespace)) for namespace in (b"a" * 16, b"b" * 16)]
        await asyncio.wait(clears, timeout=0.05)
        gate.set()
        await asyncio.gather(*clears)
        counts = [len(namespaces) for namespaces in kept]
        assert (counts == sorted(counts), counts[-1]) == (True, 2), "they only rise"
        await tier.aclose()

    run(main)


@pytest.mark.parametrize("octets", [None, b"", b"{}\n", b"x" * 2000])
def test_without_epochs_nothing_of_before_is_given(run: Any, octets: bytes | None) -> None:
    async def test() -> None:
        place = MemoryPlace()
        tier = await opened(place)
        await tier.store(WRITES)
        place.kept.pop("epochs")
        if octets is not None:
            place.kept["epochs"] = octets
        await tier.aclose()
        tier = await open_record_tier("memory", place, None, lambda: 1 << 60)
        assert await there(tier) == [False] * 4
        assert await tier.store(WRITES) == [Stored.STORED] * 4

    run(test)


def test_epochs_that_the_place_fails_to_give_are_not_replaced(run: Any) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place)
        await tier.store(WRITES)
        place.failing = {"epochs"}
        with pytest.raises(TierUnavailable):
            await opened(place)
        place.failing = set()
        assert await there(await opened(place)) == [True] * 4

    run(test)


@pytest.mark.parametrize("verb", ["delete", "clear"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_what_count_if_being_written_is_deleted_and_cleared_too(run: Any, verb: str, cancelled: bool) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place)
        place.gate.clear()
        store = asyncio.create_task(tier.store(WRITES[:1]))
        second = asyncio.create_task(tier.store(WRITES[:1]))
        while NAMES[0] not in place.inner.kept:
            await asyncio.sleep(0)
        await (tier.delete([WRITES[0].key]) if verb == "delete" else tier.clear(None))
        if cancelled:
            store.cancel()
        place.gate.set()
        if cancelled:
            with pytest.raises(asyncio.CancelledError):
                await store
        else:
            assert await store == [Stored.REFUSED]
        assert await second == [Stored.REFUSED]
        assert not await holds(tier, WRITES[0])
        assert await tier.store(WRITES[:1]) == [Stored.STORED]

    run(test)


def test_a_load_that_a_clear_overtakes_gives_nothing(run: Any) -> None:
    async def test() -> None:
        place = FaultyPlace()
        tier = await opened(place)
        await tier.store(WRITES)
        place.gate.clear()
        load = asyncio.create_task(tier.load([memory_for(write.key)[0] for write in WRITES]))
        for _ in range(5):
            await asyncio.sleep(0)
        await tier.clear(None)
        place.gate.set()
        assert await load == [None] * 4

    run(test)


def test_a_place_without_room_refuses_what_does_not_fit(run: Any) -> None:
    async def test() -> None:
        place = MemoryPlace(limit_nbytes=2 * 28672 + 4096)
        tier = await opened(place)
        assert await tier.store(WRITES) == [Stored.STORED] * 2 + [Stored.REFUSED] * 2
        assert await there(tier) == [True, True, False, False]

    run(test)


def test_what_no_record_can_say_is_refused(run: Any) -> None:
    async def test() -> None:
        tier = await opened(MemoryPlace())
        good = WRITES[0]
        assert await tier.store([good._replace(sums=good.sums[:-1])]) == [Stored.REFUSED]
        with pytest.raises(TierError):
            await tier.store([good._replace(payload=good.payload[:-4096])])
        assert await tier.store([good]) == [Stored.STORED]

    run(test)
