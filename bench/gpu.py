"""The device path on a CUDA device: how near it comes to one large page-locked copy, and what it costs the model.

`make gpu-bench`, about 3 minutes, no network, no model. Pages lie in no order, so that no two are neighbours: the worst
case for the copy engine. Rates are of the device's own clock, behind a wait that hides the host's work; what the host
does is a row of its own. Each case runs in turn with its yardstick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path as File

import numpy as np
import torch

from kvkeep.bench.rows import Case, Row, alternate, say, seconds, show, write
from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.device.choice import decide
from kvkeep.transfer.device.cuda import CudaDriver, load_driver
from kvkeep.transfer.device.device import DeviceTransfer, Direction
from kvkeep.transfer.device.kernels import PROGRAMS, KernelCopier
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.probe import probe, scattered
from kvkeep.transfer.device.streams import CudaStream
from kvkeep.transfer.device.tables import CopyJob, PageCopier, Pages, Part, parts_of
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.keys import Keys, Rotator
from kvkeep.transfer.rope.scatter import RotatingScatter
from kvkeep.transfer.transfer import Blocks

PAGE_SIZES = (4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
NBYTES = 256 << 20
SMALL_NBYTES = 64 << 20  # of pages that take the host long to list
CHUNKS, LAYERS, BLOCKS = 32, 32, 513  # of a model's cache: 8,192 tokens in blocks of 16
SIDE = 8192  # of the matrices that are multiplied
RUNS = 7
HIDDEN_CYCLES = 60_000_000  # some 30 ms in which the host prepares
WAYS = ("kernel", "copy")
NAMES = {True: "store", False: "load"}
GOALS = {8 << 10: ">= 0.8"} | dict.fromkeys(PAGE_SIZES[3:], ">= 0.9")
Copy = Callable[[], None]


def copier_by(way: str, parts: tuple[Part, ...]) -> PageCopier:
    if way == "kernel":
        return KernelCopier(parts, torch.device("cuda", 0))
    return MemcpyCopier(parts, CudaDriver(load_driver()), lambda: torch.cuda.current_stream().cuda_stream)


class Memory:
    """The same number of bytes on the device and, page-locked, on the host."""

    def __init__(self, nbytes: int) -> None:
        self.inside = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        self.outside = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def whole(self, to_pool: bool) -> Copy:
        """One large copy."""
        target, source = (self.outside, self.inside) if to_pool else (self.inside, self.outside)

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        return copy

    def paged(self, way: str, page_nbytes: int, to_pool: bool) -> Copy:
        job, parts = scattered(self.inside, self.outside, page_nbytes)
        copier = copier_by(way, parts)
        return lambda: copier.start([job], to_pool, None)


@contextmanager
def timed(stream: torch.cuda.Stream) -> Iterator[list[float]]:
    """Seconds that the device takes for what is launched inside, put into the list at the end."""
    taken: list[float] = []
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(HIDDEN_CYCLES)
        first.record()
        yield taken
        last.record()
    last.synchronize()
    taken.append(first.elapsed_time(last) / 1e3)


def rate(copy: Copy, nbytes: int) -> float:
    """GB/s of one copy alone."""
    with timed(torch.cuda.Stream()) as taken:
        copy()
    return nbytes / taken[0] / 1e9


def rate_of_both(copies: tuple[Copy, Copy], nbytes: int) -> float:
    """GB/s of two copies at once, both directions together, until the later one is complete."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    start, ends = torch.cuda.Event(enable_timing=True), [torch.cuda.Event(enable_timing=True) for _ in copies]
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(HIDDEN_CYCLES)
        start.record()
    streams[1].wait_event(start)
    for stream, copy, end in zip(streams, copies, ends, strict=True):
        with torch.cuda.stream(stream):
            copy()
            end.record()
    for end in ends:
        end.synchronize()
    return float(2 * nbytes / max(start.elapsed_time(end) for end in ends) / 1e6)


def bandwidth_rows() -> list[Row]:
    """Every page size, direction and way, beside one large copy."""
    rows = []
    for page_nbytes in PAGE_SIZES:
        nbytes = NBYTES if page_nbytes >= 64 << 10 else SMALL_NBYTES
        memory = Memory(nbytes)
        for to_pool in (True, False):
            for way in WAYS:
                paged, whole = memory.paged(way, page_nbytes, to_pool), memory.whole(to_pool)
                ours, theirs = alternate(RUNS, partial(rate, paged, nbytes), partial(rate, whole, nbytes))
                name = f"{NAMES[to_pool]}-{page_nbytes >> 10}KiB-{way}"
                case = Case(name, "GB/s", "one large page-locked copy", "higher", GOALS.get(page_nbytes, ""))
                rows.append(case.row(ours, theirs))
                say(f"{name}: {rows[-1].median:.1f} GB/s, {rows[-1].ratio:.2f} of a large copy")
    return rows


def both_rows() -> list[Row]:
    """Store and load at once, beside two large copies at once."""
    rows, stored, loaded = [], Memory(NBYTES), Memory(NBYTES)
    whole = stored.whole(True), loaded.whole(False)
    for way in WAYS:
        paged = stored.paged(way, 64 << 10, True), loaded.paged(way, 64 << 10, False)
        ours, theirs = alternate(RUNS, partial(rate_of_both, paged, NBYTES), partial(rate_of_both, whole, NBYTES))
        case = Case(f"both-64KiB-{way}", "GB/s", "two large copies at once", "higher", ">= 0.85")
        rows.append(case.row(ours, theirs))
    return rows


def product_rows() -> list[Row]:
    """A matrix product beside a copy that lasts longer than it, and alone."""
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    memory, stream = Memory(NBYTES), torch.cuda.Stream()

    def products(copy: Copy | None) -> float:
        beside = torch.cuda.Stream()
        with timed(stream) as taken:
            if copy is not None:
                beside.wait_stream(stream)  # the hidden wait
                with torch.cuda.stream(beside):
                    for _ in range(4):
                        copy()
            for _ in range(8):
                torch.mm(left, right)
        torch.cuda.synchronize()
        return taken[0] * 1e3

    rows = []
    for to_pool in (True, False):
        for way in WAYS:
            copy = memory.paged(way, 64 << 10, to_pool)
            ours, theirs = alternate(RUNS, partial(products, copy), partial(products, None))
            name = f"product-beside-{NAMES[to_pool]}-{way}"
            goal = "<= 1.10" if way == "kernel" else "<= 1.03"
            rows.append(Case(name, "ms", "the product alone", goal=goal).row(ours, theirs))
    return rows


def turned_rows() -> list[Row]:
    """A load whose K turns on its way to another position, and one whose K does not: 64 KiB a block and layer."""
    shape, stream = (2, BLOCKS, 16, 8, 128), CudaStream(torch.device("cuda", 0))
    caches = {f"l{n}": torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for n in range(LAYERS // 4)}
    group = GroupCaches(caches, BLOCKS, 16, 0)
    transfer = DeviceTransfer([group], 256, lambda parts: (Direction(copier_by("kernel", parts), stream),) * 2)
    keys = Keys("2bthd", frequencies({"rope_theta": 500_000.0}, 128, Span(8192)))
    memory = Memory(CHUNKS * transfer.shard.nbytes)
    ids = np.random.default_rng(0).permutation(np.arange(1, BLOCKS)).reshape(CHUNKS, -1).tolist()
    leases = [
        Lease(memory.outside.numpy()[n * transfer.shard.nbytes :][: transfer.shard.nbytes], transfer.shard, (0,))
        for n in range(CHUNKS)
    ]
    jobs = [CopyJob([Blocks(0, 0, tuple(one))], lease) for one, lease in zip(ids, leases, strict=True)]
    rotation = Rotator([group], transfer.shard, dict.fromkeys(caches, keys)).for_text(
        [job.blocks for job in jobs], 0, 70_000
    )
    (batch,) = rotation.batches(None, CHUNKS)
    assert batch.alike is not None
    assert batch.rotation is not None
    rotating = RotatingScatter(transfer.parts, batch.alike, batch.rotation)
    nbytes = memory.outside.numel()
    rows = []
    for name, copier in (("turned", rotating), ("plain", copier_by("kernel", transfer.parts))):
        load = partial(copier.start, jobs, False, None)
        ours, theirs = alternate(RUNS, partial(rate, load, nbytes), partial(rate, memory.whole(False), nbytes))
        rows.append(Case(f"load-64KiB-{name}", "GB/s", "one large page-locked copy", "higher").row(ours, theirs))
    return rows


def host_rows() -> list[Row]:
    """What the host does for 32 chunks of 32 layers in one batch, until the call is back."""
    page_nbytes = 32 << 10
    cache = torch.zeros((LAYERS, 2, BLOCKS, page_nbytes), dtype=torch.uint8, device="cuda")
    shard = ShardLayout(
        256, (GroupLayout(16, 0, tuple(LayerLayout(f"l{n}", (page_nbytes,) * 2) for n in range(LAYERS))),)
    )
    pages = [
        [Pages(cache[layer, half].data_ptr(), page_nbytes, page_nbytes) for half in (0, 1)] for layer in range(LAYERS)
    ]
    memory = torch.zeros(CHUNKS * shard.nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    ids = np.random.default_rng(0).permutation(np.arange(1, BLOCKS)).reshape(CHUNKS, -1).tolist()
    jobs = [
        CopyJob([Blocks(0, 0, tuple(one))], Lease(memory[n * shard.nbytes : (n + 1) * shard.nbytes], shard, (0,)))
        for n, one in enumerate(ids)
    ]
    outside, inside = torch.from_numpy(memory), torch.zeros(len(memory), dtype=torch.uint8, device="cuda")

    def until_complete() -> float:
        return seconds(lambda: (outside.copy_(inside, non_blocking=True), torch.cuda.synchronize())) * 1e3

    rows = []
    for way in WAYS:
        copier, stream = copier_by(way, parts_of(shard, [pages])), CudaStream(torch.device("cuda", 0))

        def launched(copier: PageCopier = copier, stream: CudaStream = stream) -> float:
            events = []
            taken = seconds(lambda: events.append(stream.run(lambda: copier.start(jobs, True, None)))) * 1e3
            events[0].wait()
            return taken

        ours, theirs = alternate(RUNS, launched, until_complete)
        rows.append(Case(f"host-32-chunks-{way}", "ms", "the bytes in one large copy").row(ours, theirs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=File)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure")
    device = torch.device("cuda", 0)
    rows = [row for part in (bandwidth_rows, both_rows, product_rows, turned_rows, host_rows) for row in part()]
    show(rows, f"{torch.cuda.get_device_name(0)}, {PROGRAMS} programs a launch")
    write(rows, options.json)
    samples = probe(device, CudaStream(device), partial(copier_by, "kernel"), partial(copier_by, "copy"))
    choice = decide(torch.cuda.get_device_name(0), samples, PROGRAMS)
    print(choice, *choice.lines, sep="\n")


if __name__ == "__main__":
    main()
