"""The device's path on a device: bytes, order, page-locked memory. `make gpu-test` runs it where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path as File

import numpy as np
import pytest
import torch
import xxhash

from kvkeep.engine.copies.copies import ChunkRotation, Copy
from kvkeep.engine.copies.device import DeviceCopies, DeviceScattering, Settlers
from kvkeep.engine.copies.mode import Mode, SizeMode
from kvkeep.engine.copies.thread import ThreadCopier
from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StepPlan, StoreOp, Trip
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.memory.page_lock import PageLock
from kvkeep.memory.pool import Lease, Pool
from kvkeep.memory.region import Region
from kvkeep.testing.suites.transfers import CHECKS, TransferCase
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.choice import Sample, Wish, decide, read_choice
from kvkeep.transfer.device.cuda import CudaDriver, CudaMemory, load_driver
from kvkeep.transfer.device.device import DeviceTransfer, Direction, MakeRotating
from kvkeep.transfer.device.kernels import KernelCopier
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.streams import CudaStream
from kvkeep.transfer.device.tables import CopyJob, PageCopier, Part
from kvkeep.transfer.open import open_transfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.keys import Keys, Rotator
from kvkeep.transfer.rope.rotate import Pairing, rotate_blocks, rotation_between
from kvkeep.transfer.rope.scatter import RotatingScatter
from kvkeep.transfer.transfer import Blocks, seal_ranges
from kvkeep.wire.pool_socket import HandedPool, PoolDoor, send_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NB = 9
TURNS = 200  # of a race
TEXT = 32, 8  # blocks of 16 tokens of a text, and of one of its four chunks
BOOT = b"boot number one."
WAYS = ("kernel", "copy")
real = pytest.mark.real_device  # nothing that plays a device can pass it
Groups = list[list[torch.Tensor]]


def device() -> torch.device:
    return torch.device("cuda", 0)


def copier_by(way: str, parts: tuple[Part, ...]) -> PageCopier:
    if way == "kernel":
        return KernelCopier(parts, device())
    return MemcpyCopier(parts, CudaDriver(load_driver()), lambda: torch.cuda.current_stream().cuda_stream)


def transfer_of(
    groups: list[GroupCaches], chunk_tokens: int, way: str, make_rotating: MakeRotating | None = None
) -> DeviceTransfer:
    streams = CudaStream(device()), CudaStream(device())
    return DeviceTransfer(
        groups,
        chunk_tokens,
        lambda parts: (Direction(copier_by(way, parts), streams[0]), Direction(copier_by(way, parts), streams[1])),
        make_rotating,
    )


def locked(nbytes: int) -> np.ndarray:
    return torch.full((nbytes,), 0xEE, dtype=torch.uint8, pin_memory=True).numpy()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(b"boot", Region.create(64 << 20), CudaMemory(load_driver(), 0).calls)
    pool.populated.wait(30.0)
    assert pool.page_lock is not None
    assert pool.page_lock.refusal == ""
    yield pool
    pool.close()


def on_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device()).view(dtype).view(shape)


def one_allocation(layers: int, *page: int) -> list[torch.Tensor]:
    whole = on_device(NB, layers, *page)
    return [whole[:, n] for n in range(layers)]


LAYOUTS: dict[str, tuple[Callable[[], Groups], list[int], int]] = {
    "flash attention": (lambda: [[on_device(2, NB, 16, 8, 128) for _ in range(4)]], [16], 64),
    "flashinfer": (lambda: [[on_device(NB, 2, 16, 8, 128) for _ in range(4)]], [16], 64),
    "heads first": (lambda: [[on_device(NB, 8, 16, 64).permute(0, 2, 1, 3)]], [16], 64),
    "mla": (lambda: [[on_device(NB, 64, 576) for _ in range(3)]], [64], 256),
    "one allocation": (lambda: [one_allocation(3, 2, 16, 32)], [16], 64),
    "fp8": (lambda: [[on_device(2, NB, 16, 2, 64, dtype=torch.float8_e4m3fn)]], [16], 64),
    "fp32": (lambda: [[on_device(NB, 2, 16, 64, dtype=torch.float32)]], [16], 64),
    "odd pages": (
        lambda: [[on_device(NB, 656, dtype=torch.uint8), on_device(NB, 131, dtype=torch.uint8)]],
        [1],
        3,
    ),
    "one token": (lambda: [[on_device(2, NB, 1, 1, 5, dtype=torch.float16)]], [1], 2),
    "two groups": (lambda: [[on_device(2, NB, 16, 8)], [on_device(NB, 32, 24)]], [16, 32], 64),
}


def case_of(name: str, way: str) -> TransferCase:
    make, tokens, chunk = LAYOUTS[name]
    groups = make()
    caches = [
        GroupCaches({f"g{number}.l{n}": cache for n, cache in enumerate(layers)}, NB, size, 0)
        for number, (layers, size) in enumerate(zip(groups, tokens, strict=True))
    ]

    def parts(group: int, layer: int) -> list[torch.Tensor]:
        cache = groups[group][layer]
        found = [cache] if cache.shape[0] == NB else [cache[0], cache[1]]
        return [one.permute(0, 2, 1, 3) if name == "heads first" else one for one in found]

    def read(group: int, layer: int) -> np.ndarray:
        pages = [one.contiguous().view(torch.uint8).reshape(NB, -1) for one in parts(group, layer)]
        return torch.cat(pages, 1).cpu().numpy()

    def write(group: int, layer: int, pages: np.ndarray) -> None:
        start = 0
        for one in parts(group, layer):
            nbytes = one[0].numel() * one.element_size()
            rows = torch.from_numpy(pages[:, start : start + nbytes].copy()).to(device())
            one.copy_(rows.view(one.dtype).view(one.shape))
            start += nbytes

    return TransferCase(transfer_of(caches, chunk, way), [NB] * len(groups), read, write, locked, (0,))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_conforms(way: str, name: str, check: Callable[[TransferCase], None]):
    check(case_of(name, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("only", [None, 1])
def test_a_batch_is_bit_equal_to_the_reference(way: str, only: int | None):
    caches = {f"l{n}": on_device(2, 65, 16, 8, 128) for n in range(4)}
    transfer = transfer_of([GroupCaches(caches, 65, 16, 0)], 256, way)
    reference = ReferenceTransfer([GroupCaches({n: c.cpu() for n, c in caches.items()}, 65, 16, 0)], 256)
    order = np.random.default_rng(1).permutation(np.arange(1, 65)).tolist()
    jobs = [
        CopyJob([Blocks(0, 0, tuple(order[n : n + 16]))], Lease(locked(transfer.shard.nbytes), transfer.shard, (0,)))
        for n in range(0, 64, 16)
    ]
    transfer.start_gather(jobs, only).wait()
    for job in jobs:
        wanted = Lease(np.full(transfer.shard.nbytes, 0xEE, np.uint8), transfer.shard)
        reference.gather(job.blocks, wanted, False)
        for number, (mine, theirs) in enumerate(zip(job.lease.views(), wanted.views(), strict=True)):
            assert np.array_equal(mine, theirs) if only in (None, number) else (mine == 0xEE).all()


@real
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_of_more_than_two_gib(way: str):
    cache = torch.zeros((5, 640 << 20), dtype=torch.uint8, device=device())
    cache[4, :64] = torch.arange(64, dtype=torch.uint8, device=device())
    part = cache[:, :64]
    transfer = transfer_of([GroupCaches({"l": part}, 5, 1, 0)], 2, way)
    memory = locked(transfer.shard.nbytes)
    lease = Lease(memory, transfer.shard, (0,))
    transfer.gather([Blocks(0, 1, (4,))], lease, False)
    assert memory[64:128].tolist() == list(range(64))
    assert transfer.scatter(lease, [Blocks(0, 1, (3,))], b"")
    assert torch.equal(cache[3, :64], cache[4, :64])


# ---- page-locked memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_pool_itself_is_read_and_written(way: str, pool: Pool):
    cache = on_device(2, NB, 16, 8, 128)
    transfer = transfer_of([GroupCaches({"l": cache}, NB, 16, 0)], 64, way)
    with pool.lend(4096, transfer.shard) as lease:
        assert lease.pieces == (0,)
        sums = transfer.gather([Blocks(0, 0, (1, 2, 3, 4))], lease, True)
        assert transfer.scatter(lease, [Blocks(0, 0, (5, 6, 7, 8))], sums)
    assert torch.equal(cache.view(torch.int16)[:, 5:9], cache.view(torch.int16)[:, 1:5])


@pytest.mark.parametrize("way", WAYS)
def test_a_chunk_may_cross_from_one_locked_piece_to_the_next(way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PageLock.__init__, "__defaults__", (4 << 20,))
    pool = Pool(b"boot", Region.create(16 << 20), CudaMemory(load_driver(), 0).calls)
    pool.populated.wait(30.0)
    cache = on_device(NB, 16, 1024)
    transfer = transfer_of([GroupCaches({"l": cache}, NB, 16, 0)], 64, way)
    with pool.lend((4 << 20) - 40960, transfer.shard) as lease:
        assert lease.pieces == (0, 40960)
        sums = transfer.gather([Blocks(0, 0, (1, 2, 3, 4))], lease, True)
        assert transfer.scatter(lease, [Blocks(0, 0, (5, 6, 7, 8))], sums)
    assert torch.equal(cache.view(torch.int16)[5:9], cache.view(torch.int16)[1:5])
    pool.close()


def test_a_pool_that_is_not_locked_is_staged():
    pool = Pool(b"boot", Region.create(1 << 20))
    cache = on_device(2, NB, 16, 64)
    transfer = transfer_of([GroupCaches({"l": cache}, NB, 16, 0)], 64, "kernel")
    with pool.lend(0, transfer.shard) as lease:
        sums = transfer.gather([Blocks(0, 0, (1, 2, 3, 4))], lease, True)
        assert transfer.scatter(lease, [Blocks(0, 0, (5, 6, 7, 8))], sums)
    assert torch.equal(cache.view(torch.int16)[:, 5:9], cache.view(torch.int16)[:, 1:5])
    pool.close()


@real
def test_a_refusal_leaves_no_error_for_torch_to_find():
    calls = CudaMemory(load_driver(), 0).calls
    assert "CUDA error" in calls.lock(4096, 4096)
    assert "CUDA error" in calls.unlock(4096)
    assert int(torch.ones(3, device=device()).sum()) == 3


# ---- order ---------------------------------------------------------------------------------------------------


def busy() -> None:
    """Keeps the current stream busy for about a millisecond, so that what follows there is late."""
    torch.cuda._sleep(2_000_000)


def racing(way: str) -> tuple[torch.Tensor, DeviceTransfer, np.ndarray, Lease]:
    cache = torch.zeros((NB, 16 << 10), dtype=torch.uint8, device=device())
    transfer = transfer_of([GroupCaches({"l": cache}, NB, 1, 0)], 8, way)
    memory = locked(transfer.shard.nbytes)
    return cache, transfer, memory, Lease(memory, transfer.shard, (0,))


ALL = Blocks(0, 0, tuple(range(1, 9)))


@pytest.mark.parametrize("way", WAYS)
def test_a_store_reads_what_the_step_wrote_and_not_what_is_written_after_it(way: str):
    cache, transfer, memory, lease = racing(way)
    for turn in range(TURNS):
        busy()
        cache.fill_(turn % 251)  # late, on the compute stream
        transfer.gather([ALL], lease, False)
        cache.fill_(255)  # at once
        assert (memory == turn % 251).all(), f"turn {turn}"


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_is_ordered_is_not_overtaken(way: str):
    cache, transfer, memory, lease = racing(way)
    for turn in range(TURNS):
        busy()
        cache.fill_(turn % 251)
        event = transfer.start_gather([CopyJob([ALL], lease)])
        event.order()
        cache.fill_(255)
        event.wait()
        assert event.done()
        assert (memory == turn % 251).all(), f"turn {turn}"


@pytest.mark.parametrize("way", WAYS)
def test_a_load_overwrites_what_was_written_before_it_and_is_seen_by_what_comes_after(way: str):
    cache, transfer, memory, lease = racing(way)
    seen = torch.zeros_like(cache)
    for turn in range(TURNS):
        memory[:] = turn % 251
        busy()
        cache.fill_(255)  # late: an earlier step still writes there
        event = transfer.start_scatter([CopyJob([ALL], lease)])
        event.order()
        seen.copy_(cache)  # as attention would
        event.wait()
        memory[:] = 254  # the chunk's memory is lent to another
        assert bool((seen[1:] == turn % 251).all()), f"turn {turn}"
        assert bool((seen[0] == 255).all())


@real
@pytest.mark.parametrize("way", WAYS)
def test_nobody_waits_for_work_of_others(way: str):
    cache, transfer, _, lease = racing(way)
    transfer.gather([ALL], lease, False)  # compiled
    other, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(other):
        torch.cuda._sleep(2_000_000_000)
        done.record()
    transfer.gather([ALL], lease, False)
    assert transfer.scatter(lease, [ALL], b"")
    assert not done.query(), "a device-wide wait"
    other.synchronize()
    assert not cache[1:].any()


# ---- a rank's half -------------------------------------------------------------------------------------------


class OneRank:
    """A worker over one layer of eight large blocks and a pool of its own."""

    def __init__(self, way: str, mode: Mode) -> None:
        self.cache = torch.zeros((NB, 256 << 10), dtype=torch.uint8, device=device())
        transfer = transfer_of([GroupCaches({"l": self.cache}, NB, 1, 0)], 8, way)
        self.shard = transfer.shard
        self.region = Region.create(4 * self.shard.nbytes)
        door = PoolDoor()
        send_pool(door.path, HandedPool(BOOT, self.region.fd, self.region.fd), 5.0)
        self.mapped = MappedPool(door, CudaMemory(load_driver(), 0).calls)
        lease = self.mapped.lease(BOOT, 0, self.shard)
        assert lease is not None
        lease.close()
        assert self.mapped._pool is not None
        self.mapped._pool.populated.wait(30.0)
        copies = DeviceCopies(transfer, SizeMode(mode), Settlers(ThreadCopier(), ThreadCopier()))
        self.worker = Worker(0, copies, self.mapped)

    def told(self) -> Report:
        """The next report; how long it takes is the device's business."""
        for _ in range(10_000):
            self.worker.poll(StepPlan(idle=True))
            if report := self.worker.results.take_report():
                return report
        raise AssertionError("nothing was told")

    def close(self) -> None:
        self.worker.close()
        self.region.close()


@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_is_given_to_another_request_at_once_was_stored_as_it_was(way: str, mode: Mode):
    one = OneRank(way, mode)
    for turn in range(1, TURNS):
        plan = StepPlan(turn, BOOT, (0,), stores=(StoreOp(0, (ALL,), True),))
        busy()
        one.cache.fill_(turn % 251)  # late: the step
        one.worker.save_layer(plan, "l")
        one.worker.start_stores(plan)
        one.worker.before_writes()
        one.cache.fill_(255)  # the next step writes for somebody else
        (done,) = one.told().stores
        stored = one.region.array[: one.shard.nbytes]
        assert (stored == turn % 251).all(), f"turn {turn}"
        assert done.sums == {0: xxhash.xxh3_128_digest(stored.data)}
    one.close()


@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
@pytest.mark.parametrize("way", WAYS)
def test_attention_reads_what_was_loaded_and_the_pool_is_another_requests_once_that_is_told(way: str, mode: Mode):
    one = OneRank(way, mode)
    seen = torch.zeros_like(one.cache)
    for turn in range(1, TURNS):
        one.region.array[: one.shard.nbytes] = turn % 251
        plan = StepPlan(turn, BOOT, (0,), loads=(LoadOp(BOOT, "r", 0, 0, blocks=(ALL,)),))
        busy()
        one.cache.fill_(255)  # late: an earlier step still writes there
        one.worker.before_writes()
        one.worker.start_loads(plan)
        one.worker.wait_layer("l")
        seen.copy_(one.cache)  # as attention would
        one.worker.start_stores(plan)
        assert one.told().loads == [LoadsDone(turn, 0, ())]
        one.region.array[: one.shard.nbytes] = 254
        assert bool((seen[1:] == turn % 251).all()), f"turn {turn}"
    one.close()


@real
def test_a_step_waits_for_no_copy():
    one = OneRank("kernel", "bulk")
    plan = StepPlan(1, BOOT, (0,), stores=(StoreOp(0, (ALL,), True),))
    one.worker.start_stores(plan)  # compiled
    one.told()
    torch.cuda._sleep(2_000_000_000)  # the step computes for about a second
    over = torch.cuda.Event()
    over.record()
    one.worker.start_stores(plan)
    one.worker.start_loads(StepPlan(2, BOOT, (0,), trips=(Trip(3, (LoadOp(BOOT, "r", 0, 0, blocks=(ALL,)),)),)))
    one.worker.before_writes()
    one.worker.poll(StepPlan())
    assert not one.worker.results.take_report(), "told before its copy was over"
    assert not over.query(), "the engine's thread waited"
    assert one.told()
    one.close()


# ---- position, and what is chosen ----------------------------------------------------------------------------


class Text:
    """Four chunks of a model's K and V, kept in page-locked memory, and empty blocks for them."""

    def __init__(self, dtype: torch.dtype, keys: Keys, on_the_way: bool = True) -> None:
        blocks, self.per_chunk = TEXT
        self.tokens = 16 * blocks
        shape = (2, 1 + 2 * blocks, 16, 8, 128)
        self.caches = {f"l{n}": torch.randn(shape, device=device()).to(dtype) for n in range(3)}
        group = GroupCaches(self.caches, shape[1], 16, 0)
        make_rotating = RotatingScatter if on_the_way else None
        self.transfer = transfer_of([group], 16 * self.per_chunk, "kernel", make_rotating)
        shard = self.transfer.shard
        self.rotator = Rotator([group], shard, dict.fromkeys(self.caches, keys))
        ids = np.random.default_rng(3).permutation(np.arange(1, shape[1])).tolist()
        self.here, self.there = ids[:blocks], ids[blocks:]
        self.memory = locked(4 * shard.nbytes)
        self.leases = [Lease(self.memory[n * shard.nbytes :][: shard.nbytes], shard, (0,)) for n in range(4)]

    def chunks(self, ids: list[int]) -> list[Copy]:
        size = self.per_chunk
        blocks = [[Blocks(0, 0, ids[size * n :][:size])] for n in range(len(self.leases))]
        return [Copy(*pair, seal=True, layerwise=True) for pair in zip(self.leases, blocks, strict=True)]

    def kept(self, mode: Mode) -> list[bytes]:
        """Stores what is in the blocks `here`; its sums."""
        stores = DeviceCopies(self.transfer, SizeMode(mode)).gather(self.chunks(self.here))
        for layer in range(3):
            stores.save(layer)
        stores.finish()
        return [part for _, part in sorted(stores.end().items())]

    def loads(self, mode: Mode, by: int) -> DeviceScattering:
        chunks = self.chunks(self.there)
        text = self.rotator.for_text([copy.blocks for copy in chunks], 0, by) if by else None
        if text is not None:
            chunks = [copy._replace(rotation=ChunkRotation(text, n)) for n, copy in enumerate(chunks)]
        return DeviceCopies(self.transfer, SizeMode(mode)).scatter(chunks)

    def there_by_torch(self, by: int) -> list[torch.Tensor]:
        """The caches once the text has been copied, and its K turned, by torch alone."""
        made, positions = [one.clone() for one in self.caches.values()], torch.arange(self.tokens, device=device())
        for number, one in enumerate(made):
            one[:, self.there] = one[:, self.here]
            keys = next(alike.keys for alike in self.rotator.alike if number in [p.range_ for p in alike.planes])
            rotation = rotation_between((positions, keys.frequencies), (positions + by, keys.frequencies))
            rotate_blocks(one[0], self.there, rotation, keys.pairing)
        return made


def paces() -> torch.Tensor:
    return frequencies({"rope_theta": 500_000.0}, 128, Span(8192))


@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_k_turns_on_its_way_as_it_does_by_torch(dtype: torch.dtype, interleaved: bool, mode: str):
    text = Text(dtype, Keys("2bthd", paces(), Pairing(interleaved)))
    text.kept(mode)
    wanted = text.there_by_torch(70_000)
    loads = text.loads(mode, 70_000)
    for layer in range(3):
        loads.wait(layer)
    assert not loads.end()
    for one, other in zip(text.caches.values(), wanted, strict=True):
        assert torch.equal(one[1].view(torch.uint8), other[1].view(torch.uint8)), "V turned"
        still = [n for n in range(one.shape[1]) if n not in text.there]
        assert torch.equal(one[:, still].view(torch.uint8), other[:, still].view(torch.uint8))
        # a fused multiply-add rounds once less
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("by", [0, 70_000])
@pytest.mark.parametrize("on_the_way", [False, True])
@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
def test_a_program_finds_each_layer_after_its_step_without_waiting(mode: str, on_the_way: bool, by: int):
    text = Text(torch.float32, Keys("2bthd", paces()), on_the_way)
    sums = text.kept(mode)
    assert [seal_ranges(text.transfer.shard.ranges, one.views()) for one in text.leases] == sums
    wanted = text.there_by_torch(by)
    for turn in range(TURNS // 4):
        busy()
        for one in text.caches.values():
            one[:, text.there] = float("nan")  # late: an earlier step still writes there
        loads, seen = text.loads(mode, by), []
        for layer, one in enumerate(text.caches.values()):
            loads.wait(layer)
            seen.append(one.clone())  # as attention would
        loads.end()
        text.memory[:] = 0xFF  # lent to another: NaN
        for one, other in zip(seen, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=f"turn {turn}")
        assert text.kept(mode) == sums


@real
def test_a_program_that_goes_by_layer_waits_for_no_layer():
    text = Text(torch.bfloat16, Keys("2bthd", paces()))
    text.kept("layerwise")
    first = text.loads("layerwise", 9)
    for layer in range(3):
        first.wait(layer)  # compiled
    first.end()
    torch.cuda._sleep(2_000_000_000)  # the program's own work, for about a second
    over = torch.cuda.Event()
    over.record()
    loads = text.loads("layerwise", 9)
    for layer in range(3):
        loads.wait(layer)
    assert not over.query(), "the caller waited"
    loads.end()


@real
def test_opening_measures_once_and_keeps_it(tmp_path: File):
    caches = GroupCaches({"l": on_device(2, NB, 16, 64)}, NB, 16, 0)
    kept = tmp_path / "transfer.json"
    first = open_transfer([caches], 64, Wish(kept))
    assert isinstance(first.transfer, DeviceTransfer)
    assert first.pin_calls is not None
    choice = read_choice(kept, torch.cuda.get_device_name(0), 16)
    assert choice is not None
    assert all(isinstance(sample, Sample) and sample.kernel_rate > 1e8 for sample in choice.samples)
    assert decide(choice.device, choice.samples, 16) == choice
    written = os.stat(kept).st_mtime_ns
    assert open_transfer([caches], 64, Wish(kept)).text == first.text == str(choice)
    assert os.stat(kept).st_mtime_ns == written
