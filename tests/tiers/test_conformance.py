"""Every tier keeps the contract: one line a case."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvkeep.config import Disk, Durability
from kvkeep.testing.doubles.codecs import ZlibCodec
from kvkeep.testing.doubles.memory_place import MemoryPlace
from kvkeep.testing.suites import places
from kvkeep.testing.suites.tiers import CHECKS, Check
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.tiers.record import RAW_RECORDS, Records
from kvkeep.tiers.record_tier import open_record_tier
from kvkeep.tiers.tier import Tier

LIMIT = 64 << 20


async def memory(_: Path) -> Tier:
    return await open_record_tier("memory", MemoryPlace())


async def memory_with_codec(_: Path) -> Tier:
    return await open_record_tier("memory", MemoryPlace(), ZlibCodec())


def disk(
    directories: int = 1,
    direct: bool = True,
    durability: Durability = Durability.NONE,
    records: Records = RAW_RECORDS,
) -> Callable[[Path], Awaitable[Tier]]:
    async def make(root: Path) -> Tier:
        places = tuple(str(root / str(number)) for number in range(directories))
        options = Disk(path=places, size=LIMIT, direct=direct, durability=durability, min_free=0)
        return await open_disk(options, records=records)

    return make


CASES = {
    "memory": memory,
    "memory-codec": memory_with_codec,
    "disk": disk(),
    "disk-buffered": disk(direct=False),
    "disk-three-directories": disk(directories=3),
    "disk-group": disk(durability=Durability.GROUP),
    "disk-codec": disk(records=Records(ZlibCodec())),
    "disk-every": disk(durability=Durability.EVERY),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("case", CASES)
def test_conformance(case: str, check: Check, tmp_path: Path) -> None:
    async def run() -> None:
        tier = await CASES[case](tmp_path)
        try:
            await check(tier)
        finally:
            await tier.aclose()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("check", places.CHECKS, ids=lambda one: one.__name__)
def test_the_place_in_memory_is_a_place(check: places.Check) -> None:
    asyncio.run(asyncio.wait_for(check(MemoryPlace()), 20))
