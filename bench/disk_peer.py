"""LMCache's local disk backend, timed: each line on stdin is a verb (store, load, delete), each answer its seconds.

`python disk_peer.py FOLDER MIB COUNT` in the environment of `scripts/peers.sh`: COUNT chunks of MIB each, O_DIRECT, 4
threads (its default). Knows nothing about who else is measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend


class Peer:
    """The backend and `count` chunks of `mib` MiB: as many layers of 256 tokens with 1,024 elements, K and V."""

    def __init__(self, folder: str, mib: int, count: int) -> None:
        shape = torch.Size([2, mib, 256, 1024])
        metadata = LMCacheMetadata(
            model_name="m",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(mib, 2, 256, 8, 128),
        )
        allocator = MixedMemoryAllocator(2 * count * (mib << 20) + (64 << 20))
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256,
            local_cpu=False,
            local_disk=f"file://{folder}/",
            max_local_disk_size=16,
            max_local_cpu_size=4,
            extra_config={"use_odirect": True},
        )
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        cpu = LocalCPUBackend(config, metadata, dst_device="cpu", memory_allocator=allocator)
        self.backend = LocalDiskBackend(config, loop, cpu, dst_device="cpu", metadata=metadata)
        self.keys = [CacheEngineKey("m", 1, 0, number, torch.bfloat16, None) for number in range(count)]
        self.chunks = [allocator.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD) for _ in range(count)]
        draw = torch.Generator().manual_seed(2)  # a device may be faster with bytes that are all alike
        for one in self.chunks:
            one.tensor.view(torch.int16).random_(generator=draw)

    def store(self) -> None:
        """Returns when every file is closed."""
        done = threading.Semaphore(0)
        self.backend.batched_submit_put_task(self.keys, self.chunks, on_complete_callback=lambda _: done.release())
        for _ in self.keys:
            done.acquire()

    def load(self) -> list[Any]:
        """The chunks, in memory of its own."""
        loaded: list[Any] = self.backend.batched_get_blocking(self.keys)
        return loaded

    def release(self, loaded: list[Any]) -> None:
        """Checks that it is what was stored, and gives its memory back."""
        for kept, one in zip(self.chunks, loaded, strict=bool(loaded)):
            assert torch.equal(kept.tensor.view(torch.int16), one.tensor.view(torch.int16))
            one.ref_count_down()

    def delete(self) -> None:
        """Also from what it counts, which `remove` leaves."""
        for key in self.keys:
            self.backend.remove(key)
        self.backend.current_cache_size = 0.0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    peer = Peer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        start = time.perf_counter()
        got = {"store": peer.store, "load": peer.load, "delete": peer.delete}[line.strip()]()
        elapsed = time.perf_counter() - start
        peer.release(got or [])
        print(json.dumps(elapsed), file=answers)


if __name__ == "__main__":
    main()
