"""Real processes: one that is killed while it stores, one that ends while its disk hangs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.record import record_nbytes

pytestmark = pytest.mark.process

SIZES = (1 << 16,)
COUNT = 64

STORING = """
import asyncio, sys
from kvkeep.testing.suites.tiers import key, write_of
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.config import Disk

async def main():
    tier = await open_disk(Disk(path=(sys.argv[1],), size=3 << 20, min_free=0))
    print("at work", flush=True)
    while True:
        for number in range(64):
            await tier.store([write_of(key(number), (1 << 16,))])
            print(number, flush=True)

asyncio.run(main())
"""

HANGING = """
import asyncio, sys
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import key, write_of, memory_for
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.config import Disk

async def main():
    disk = FaultyDisk()
    options = Disk(path=(sys.argv[1],), size=3 << 20, min_free=0, close_s=0.05)
    tier = await open_disk(options, disk.files)
    await tier.wait_for_scan()
    await tier.store([write_of(key(1))])
    disk.hanging = frozenset({"readv"})
    load = asyncio.ensure_future(tier.load([memory_for(key(1))[0]]))
    while not disk.waiting:
        await asyncio.sleep(0)
    await tier.aclose()
    print("closed", load.done(), flush=True)

loop = asyncio.new_event_loop()
loop.run_until_complete(main())
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_while_it_stores(run: Any, opened: Any, root: Any, kills: int) -> None:
    limit = 3 << 20

    def kill_one(number: int) -> None:
        with subprocess.Popen([sys.executable, "-c", STORING, str(root)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(3 + 7 * number):
                assert child.stdout.readline()
            child.kill()

    async def test() -> None:
        for number in range(kills):
            kill_one(number)
            assert FaultyDisk().allocated_nbytes(str(root)) <= limit
            async with opened(size=limit) as tier:
                writes = [write_of(key(one), SIZES) for one in range(COUNT)]
                there = [await holds(tier, one) for one in writes]
                assert sum(there) >= min(1 + 7 * number, 30)
                assert tier.figures().used_nbytes == sum(there) * record_nbytes(SIZES)
                assert tier.figures().corrupt == 0, "a record that has its name is whole"

    run(test)


def test_a_process_ends_though_its_disk_hangs(root: Any) -> None:
    done = subprocess.run([sys.executable, "-c", HANGING, str(root)], timeout=10, capture_output=True, check=False)
    assert done.stdout == b"closed False\n"
    assert done.returncode == 0, done.stderr
