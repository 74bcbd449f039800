"""Records that somebody removes or cuts while several stores run: the limit is kept, and the count stays true."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from kvkeep.testing.doubles.faulty_files import FaultyDisk, record_paths
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.record import record_nbytes

WRITES = [write_of(key(number), (4096,)) for number in range(80)]
RECORD = record_nbytes((4096,))
LIMIT = 24 * RECORD


def disturb(root: Path, rng: random.Random, share: float) -> None:
    """Removes some records and cuts others; what is being written is nobody's to touch."""
    for path in list(record_paths(str(root))):
        chance = rng.random() / share if "/new/" not in path else 1.0
        if chance < 0.75:
            os.unlink(path)
        elif chance < 1.0:
            os.truncate(path, 0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_stores_at_once_after_records_were_removed_keep_the_limit(run: Any, opened: Any, root: Path, seed: int) -> None:
    async def test() -> None:
        disk, rng, most = FaultyDisk(), random.Random(seed), 0

        def look() -> None:
            nonlocal most
            most = max(most, disk.allocated_nbytes(str(root)))
            if rng.random() < 0.05:
                disturb(root, rng, 0.1)

        disk.after = look
        async with opened(disk.files, size=LIMIT) as tier:
            for _ in range(25):
                await asyncio.gather(*(tier.store(rng.sample(WRITES, 6)) for _ in range(6)))
                disturb(root, rng, 0.4)
                await asyncio.gather(*(tier.store(rng.sample(WRITES, 6)) for _ in range(6)))
                assert 0 <= tier.figures().used_nbytes <= LIMIT
            assert most <= LIMIT
            disk.after = lambda: None
            for one in WRITES:  # what is gone is found to be
                await holds(tier, one)
            await tier.store([])
            assert tier.figures().used_nbytes == disk.allocated_nbytes(str(root))
        async with opened(size=LIMIT) as tier:
            assert tier.figures().used_nbytes == disk.allocated_nbytes(str(root)), "its order was lost"

    run(test)
