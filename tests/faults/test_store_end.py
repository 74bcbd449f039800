"""A store process whose tier hangs: it ends all the same, and no thread of the device keeps it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

pytestmark = pytest.mark.process

CHUNK = 4096
LIMIT_S = 20.0
STORE = """
import asyncio, sys
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.memory.region import Region
from kvkeep.store.store import Store
from kvkeep.store.below.tiers import TierWalk
from kvkeep.testing.doubles.gate_tier import GateTier
from kvkeep.store.server.listening import listen
from kvkeep.store.process import serve_to_the_end
from kvkeep.store.server.server import Server
from pathlib import Path

class Hanging(GateTier):
    async def {verb}(self, *arguments):
        print("hangs", flush=True)
        while True:  # as a device's thread does, whoever cancels it
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

    async def contains(self, keys):
        return [True] * len(keys)

async def nothing():
    pass

path = Path(sys.argv[1])
with Region.create(8 * 4096) as region, listen(path) as listener:
    walk = TierWalk(Store(Index(FreeList(region.nbytes), policy_by_name("lru")), region.nbytes, 1.0), region.array)
    walk.add("disk", Hanging())
    print("listens", flush=True)
    serve_to_the_end(Server(walk, bytes(16), region.fd, None, listener), nothing(), 0.2)
print("ended", flush=True)
"""


def joined(path: Path) -> Client:
    hello = m.Hello(
        name="test", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()], sizes=[CHUNK]
    )
    return Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)


@pytest.mark.parametrize("verb", ["load", "store"])
def test_a_hanging_tier_does_not_keep_the_process(tmp_path: Path, verb: str) -> None:
    tmp_path.chmod(0o700)
    command = [sys.executable, "-c", STORE.replace("{verb}", verb), str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        client = joined(tmp_path / "store")
        if verb == "load":
            client.fetch([b"d" * 32], 100.0)
        else:
            granted = client.wait(client.reserve([b"d" * 32]), LIMIT_S)
            assert isinstance(granted, m.Granted)
            client.wait(client.commit(granted.lease, [0], [bytes(16)]), LIMIT_S)
        assert process.stdout.readline() == "hangs\n"
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert process.stdout.read() == "ended\n"
        client.drop()
