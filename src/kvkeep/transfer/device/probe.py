"""Measures how fast a device copies pages each way, in about a second: the samples that `choice` decides by.

Pages are taken from all over the memory, so that no two are neighbours. Knows nothing about the model's caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.device.choice import Sample
from kvkeep.transfer.device.streams import CopyStream
from kvkeep.transfer.device.tables import CopyJob, PageCopier, Pages, Part, parts_of
from kvkeep.transfer.transfer import Blocks

PAGE_SIZES = tuple(4096 << two for two in range(0, 11, 2))  # 4 KiB to 4 MiB
NBYTES = 32 << 20
_RUNS = 3

MakeCopier = Callable[[tuple[Part, ...]], PageCopier]


def probe(device: torch.device, stream: CopyStream, kernel: MakeCopier, copy: MakeCopier) -> list[Sample]:
    """The rates of both ways for every page size and direction: the best of three runs."""
    inside = torch.zeros(NBYTES, dtype=torch.uint8, device=device)
    outside = torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    samples = []
    for page_nbytes in PAGE_SIZES:
        job, parts = scattered(inside, outside, page_nbytes)
        copiers = [kernel(parts), copy(parts)]
        for to_pool in (True, False):
            rates = [rate(stream, copier, job, to_pool) for copier in copiers]
            samples.append(Sample(to_pool, page_nbytes, *rates))
    return samples


def scattered(inside: torch.Tensor, outside: torch.Tensor, page_nbytes: int) -> tuple[CopyJob, tuple[Part, ...]]:
    """A job that copies all pages of `inside`, in no order, and the parts it is for."""
    count = inside.numel() // page_nbytes
    shard = ShardLayout(count, (GroupLayout(1, 0, (LayerLayout("probe", (page_nbytes,)),)),))
    order = np.random.default_rng(0).permutation(count)
    parts = parts_of(shard, [[[Pages(inside.data_ptr(), page_nbytes, page_nbytes)]]])
    return CopyJob([Blocks(0, 0, tuple(order.tolist()))], Lease(outside.numpy(), shard, (0,))), parts


def rate(stream: CopyStream, copier: PageCopier, job: CopyJob, to_pool: bool) -> float:
    """Bytes a second from the call until the bytes are there."""
    times = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        stream.run(lambda: copier.start([job], to_pool, None)).wait()
        times.append(time.perf_counter() - start)
    return NBYTES / min(times[1:])
