"""The walk over a real disk tier whose reads of one record hang: nobody else waits, and the disk goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import kvkeep.tiers.open as tiers_open
from kvkeep.config import Disk
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.store.below.fetches import FetchLimits, Found
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.openings import Opening
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.telemetry import Miss, by_flat_name
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import key, write_of
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.disk.disk import DiskTier, open_disk
from kvkeep.tiers.tier import Tier

SIZES = (4096,)
CHUNK, ROOM = 4096, 16
WRITES = [write_of(key(number), SIZES) for number in range(8)]
SOON_S, EVER_S = 0.05, 30.0


async def asked(walk: TierWalk, session: Session, *numbers: int, deadline_s: float) -> Found:
    """The answer to a fetch, its lease released."""
    digests = [WRITES[number].key[16:] for number in numbers]
    answer = await walk.fetches.fetch(session, digests, FetchLimits(deadline_s))
    walk.store.release(session, answer.fetched.lease)
    return answer


@pytest.mark.long
def test_one_read_that_hangs_leaves_the_other_threads_of_a_disk_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk()
    memory = aligned_bytes(ROOM * CHUNK)
    store = Store(Index(FreeList(memory.nbytes), policy_by_name("lru")), memory.nbytes)
    walk = TierWalk(store, memory)

    async def take(name: str, tier: Tier, figures: Callable[[], Mapping[str, int]], reads: int) -> None:
        assert isinstance(tier, DiskTier)
        await tier.wait_for_scan()
        await tier.store(WRITES)
        await walk.admit(name, tier, figures, reads)

    async def scene() -> None:
        await tiers_open.open_tiers([options], take, lambda *said: None)
        session = store.open(Opening("test", WRITES[0].key[:16], "", CHUNK, holders=(), verify_every=0, sizes=SIZES))
        (path,) = tmp_path.glob(f"*/*/{WRITES[0].key[16:].hex()}")
        disk.hanging = frozenset({f"readv {path}"})
        assert (await asked(walk, session, 0, 1, deadline_s=SOON_S)).took_s >= SOON_S
        late = await asked(walk, session, 0, 1, deadline_s=EVER_S)
        assert (late.fetched.offsets, late.why) == ([], Miss.TIER_FAILED), "nobody waits for it again"
        while not (other := await asked(walk, session, 2, 3, deadline_s=EVER_S)).fetched.offsets:
            await asyncio.sleep(SOON_S)  # it is left alone for a while
        assert (len(other.fetched.offsets), other.sources["disk"] > 0) == (2, True)
        assert by_flat_name(walk.figures())["disk_quarantined_nbytes"] > 0, "while the read hangs"
        disk.hanging, held = frozenset(), disk.wake
        held.set()
        while by_flat_name(walk.figures())["disk_quarantined_nbytes"]:
            await asyncio.sleep(SOON_S)
        assert len((await asked(walk, session, 0, 1, deadline_s=EVER_S)).fetched.offsets) == 2
        await walk.aclose(0.0)

    options = Disk(path=(str(tmp_path),), size=1 << 20, min_free=0)
    monkeypatch.setattr(tiers_open, "open_disk", lambda options: open_disk(options, disk.files))
    tmp_path.chmod(0o700)

    async def limited() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(limited())
    assert disk.waiting == 1
