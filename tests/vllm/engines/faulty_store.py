"""A store process whose disk fails when it is told to: `faulty_store.py SOCKET DISK POOL_NBYTES`.

The same parts as the real one, over a `FaultyDisk`. A line of JSON on its standard input is a command, answered by a
line on its standard output:

    {"drop": 1}              the pool is emptied, the disk keeps what it has
    {"clear": 1}             both are
    {"fail": [paths]}        from now on reads of these records end with EIO; [] is the end of it
    {"hang": true|[paths]}   reads hang, all or those of these records; false: they go on, and no more hang
    {"die": path}            kill -9, by itself, in the middle of the next read of this record
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from kvkeep.config import Disk
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.errors import TierError
from kvkeep.memory.region import Region
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.process import serve_to_the_end
from kvkeep.store.server.listening import listen
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.tiers.open import disk_figures

DISK_NBYTES, FREE_NBYTES = 64 << 20, 1 << 20
DRAIN_S = 5.0


@dataclass
class Faults:
    """What goes wrong with the records of `disk`, and what is done to the pool of `walk`."""

    walk: TierWalk
    disk: FaultyDisk = field(default_factory=FaultyDisk)
    failing: frozenset[str] = frozenset()
    fatal: str = ""

    def __post_init__(self) -> None:
        self.disk.fault = self._fault

    def obey(self, command: dict) -> object:
        """Does what the line says."""
        if "drop" in command:
            return self.walk.store.index.clear(None)
        if "fail" in command:
            self.failing = frozenset(command["fail"])
        elif "die" in command:
            self.fatal = command["die"]
        elif command["hang"]:
            paths = command["hang"]
            self.disk.hanging = frozenset({"readv"} if paths is True else {f"readv {path}" for path in paths})
        else:
            held, self.disk.wake, self.disk.hanging = self.disk.wake, threading.Event(), frozenset()
            held.set()
        return None

    def _fault(self, call: str, path: str) -> int:
        if call == "readv" and path == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return errno.EIO if call == "readv" and path in self.failing else 0


async def opened(faults: Faults, options: Disk) -> None:
    """Opens the disk and says that it is ready once all that was there is known; from then on it obeys."""
    try:
        tier = await open_disk(options, faults.disk.files)
    except TierError as error:
        print(f"not ready: {error}", flush=True)
        return
    await tier.wait_for_scan()
    await faults.walk.admit("disk", tier, lambda: disk_figures(tier), options.threads)

    def command() -> None:
        line = sys.stdin.readline()
        if line and "clear" in json.loads(line):
            faults.walk.store.index.clear(None)
            cleared = asyncio.ensure_future(faults.walk.clear(None))
            cleared.add_done_callback(lambda _: print("null", flush=True))
        elif line:
            print(json.dumps(faults.obey(json.loads(line))), flush=True)
        else:
            asyncio.get_running_loop().remove_reader(0)
            os.kill(os.getpid(), signal.SIGTERM)  # who commanded it is gone

    asyncio.get_running_loop().add_reader(0, command)
    print("ready", flush=True)


def main(socket: Path, folder: str, pool_nbytes: int) -> None:
    options = Disk(path=(folder,), size=DISK_NBYTES, min_free=FREE_NBYTES)
    with Region.create(pool_nbytes) as region, listen(socket) as listener:
        walk = TierWalk(Store(Index(FreeList(pool_nbytes), policy_by_name("lru")), pool_nbytes), region.array)
        server = Server(walk, secrets.token_bytes(16), region.fd, None, listener)
        serve_to_the_end(server, opened(Faults(walk), options), DRAIN_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
