"""The device's path on the CPU: its kernel in Triton's interpreter, its copy engine played by memmove."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import LeaseExpired
from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.device import InlineStream
from kvkeep.testing.suites.transfers import CHECKS, TransferCase
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.device import DeviceTransfer, Direction
from kvkeep.transfer.device.kernels import TILE_NBYTES, KernelCopier, copy_pages, refusal
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.streams import CopyEvent
from kvkeep.transfer.device.tables import CopyJob, PageCopier, Part
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks

CPU = torch.device("cpu")
DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32]
PROGRAMS = 3


@dataclass
class Launches:
    """The kernel in the interpreter; it notes how many programs each launch had, and the width of their accesses."""

    grids: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        self.grids.append(grid[0])
        launch = InterpretedFunction(copy_pages.fn)[grid]

        def run(parts: torch.Tensor, batch: torch.Tensor, to_pool: bool, width: int, tile: int) -> None:
            self.widths.append(width)
            launch(parts, batch, to_pool, width, tile)

        return run


class Memmove:
    """A copy engine without a device. It notes its copies' sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        assert stream == 7
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, nbytes)
        self.sizes += sizes.tolist()


def by_kernel(parts: Sequence[Part], kernel: Any = None) -> PageCopier:
    return KernelCopier(parts, CPU, PROGRAMS, kernel or Launches())


def by_copy(parts: Sequence[Part], driver: Memmove | None = None) -> PageCopier:
    return MemcpyCopier(parts, driver or Memmove(), lambda: 7)


MOVERS = {"kernel": by_kernel, "copy": by_copy}


def transfer_of(groups: Sequence[GroupCaches], chunk_tokens: int, copier: Callable[..., PageCopier]) -> DeviceTransfer:
    def paths(parts: tuple[Part, ...]) -> tuple[Direction, Direction]:
        return Direction(copier(parts), InlineStream()), Direction(copier(parts), InlineStream())

    return DeviceTransfer(groups, chunk_tokens, paths)


def reachable(memory: np.ndarray, shard: ShardLayout) -> Lease:
    return Lease(memory, shard, (0,))


def memory_for(shard: ShardLayout, pieces: tuple[int, ...] = (0,)) -> tuple[np.ndarray, Lease]:
    memory = np.full(shard.nbytes, 0xEE, np.uint8)
    return memory, Lease(memory, shard, pieces)


# ---- layouts -------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A group's caches; `kind` is how a layer lies in memory, `skew` how far (bytes) from an aligned address."""

    kind: str
    dtype: torch.dtype
    layers: int
    block_tokens: int
    heads: int
    head_size: int
    skew: int


class Caches(NamedTuple):
    group: GroupCaches
    memory: list[torch.Tensor]  # uint8, all that the group's caches lie in


def build(spec: Spec, blocks: int, seed: int) -> Caches:
    page = (spec.block_tokens, spec.heads, spec.head_size)
    shapes = {
        "blocks first": (spec.layers, (blocks, *page), lambda one: one),
        "k and v": (spec.layers, (2, blocks, *page), lambda one: one),
        "k beside v": (spec.layers, (blocks, 2, *page), lambda one: one),
        "one allocation": (1, (blocks, spec.layers, *page), lambda one: one),
        "heads first": (spec.layers, (blocks, page[1], page[0], page[2]), lambda one: one.permute(0, 2, 1, 3)),
    }
    count, shape, turned = shapes[spec.kind]
    random = np.random.default_rng(seed)
    nbytes = int(np.prod(shape)) * spec.dtype.itemsize
    skew = spec.skew * spec.dtype.itemsize
    memory = [torch.from_numpy(random.integers(0, 256, nbytes + skew, np.uint8)) for _ in range(count)]
    caches = [turned(one[skew:].view(spec.dtype).view(shape)) for one in memory]
    if spec.kind == "one allocation":
        caches = [caches[0][:, layer] for layer in range(spec.layers)]
    named = {f"l{number}": cache for number, cache in enumerate(caches)}
    return Caches(GroupCaches(named, blocks, spec.block_tokens, 0), memory)


def specs(block_tokens: st.SearchStrategy[int]) -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec,
        kind=st.sampled_from(["blocks first", "k and v", "k beside v", "one allocation", "heads first"]),
        dtype=st.sampled_from(DTYPES),
        layers=st.integers(1, 2),
        block_tokens=block_tokens,
        heads=st.integers(1, 3),
        head_size=st.sampled_from([1, 3, 5, 7, 8, 24, 80]),
        skew=st.sampled_from([0, 1, 2]),
    )


@st.composite
def models(draw: st.DrawFn) -> list[Spec]:
    """One group or two, with blocks of 1 to 256 tokens; a chunk holds whole blocks of both."""
    largest = draw(st.integers(1, 256))
    divisors = [size for size in range(1, largest + 1) if largest % size == 0]
    first = draw(specs(st.just(largest)))
    return [first, *draw(st.lists(specs(st.sampled_from(divisors)), max_size=1))]


@pytest.mark.parametrize("way", MOVERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), chosen=models(), seed=st.integers(0, 99))
def test_any_layout_is_bit_equal_to_the_reference(way: str, data: st.DataObject, chosen: list[Spec], seed: int):
    blocks = 7
    mine, theirs = ([build(spec, blocks, seed + n) for n, spec in enumerate(chosen)] for _ in range(2))
    chunk_tokens = 2 * max(spec.block_tokens for spec in chosen)
    places = [chunk_tokens // spec.block_tokens for spec in chosen]
    reference = ReferenceTransfer([one.group for one in theirs], chunk_tokens)
    transfer = transfer_of([one.group for one in mine], chunk_tokens, MOVERS[way])
    assert transfer.shard == reference.shard

    def some(group: int, unique: bool) -> Blocks:
        ids = st.lists(st.integers(1, blocks - 1), max_size=min(4, places[group]), unique=unique).map(tuple)
        block_ids = data.draw(ids)
        return Blocks(group, data.draw(st.integers(0, places[group] - len(block_ids))), block_ids)

    gathered = [some(group, False) for group in range(len(chosen))]
    memory, lease = memory_for(transfer.shard)
    wanted, wanted_lease = memory_for(reference.shard)
    seal = data.draw(st.booleans())
    assert transfer.gather(gathered, lease, seal) == reference.gather(gathered, wanted_lease, seal)
    assert np.array_equal(memory, wanted)
    scattered = [some(group, True) for group in range(len(chosen))]
    assert transfer.scatter(lease, scattered, b"")
    assert reference.scatter(wanted_lease, scattered, b"")
    for one, other in zip(mine, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.memory, other.memory, strict=True))


def as_bytes(cache: torch.Tensor, blocks: int) -> torch.Tensor:
    return cache.reshape(blocks, -1).view(torch.uint8)


def conformance_case(groups: list[list[torch.Tensor]], tokens: list[int], chunk: int, way: str) -> TransferCase:
    blocks = 9
    caches = [
        GroupCaches({f"l{n}": cache for n, cache in enumerate(layers)}, blocks, size, 0)
        for layers, size in zip(groups, tokens, strict=True)
    ]

    def parts(group: int, layer: int) -> list[torch.Tensor]:
        cache = groups[group][layer]
        return [cache] if cache.shape[0] == blocks else [cache[0], cache[1]]

    def read(group: int, layer: int) -> np.ndarray:
        return torch.cat([as_bytes(one, blocks) for one in parts(group, layer)], 1).numpy()

    def write(group: int, layer: int, pages: np.ndarray) -> None:
        start = 0
        for one in parts(group, layer):
            rows = as_bytes(one, blocks)
            rows.copy_(torch.from_numpy(pages[:, start : start + rows.shape[1]]))
            start += rows.shape[1]

    return TransferCase(transfer_of(caches, chunk, MOVERS[way]), [blocks] * len(groups), read, write, pieces=(0,))


CASES = {
    "k and v": lambda way: conformance_case([[torch.zeros(2, 9, 16, 2, 8).bfloat16()] * 1], [16], 64, way),
    "odd pages": lambda way: conformance_case(
        [[torch.zeros((9, 656), dtype=torch.uint8), torch.zeros((9, 131), dtype=torch.uint8)]], [1], 3, way
    ),
    "two groups": lambda way: conformance_case(
        [[torch.zeros(2, 9, 16, 8).half()], [torch.zeros(9, 32, 4), torch.zeros(9, 32, 8)]], [16, 32], 64, way
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", MOVERS)
def test_conforms(way: str, name: str, check: Callable[[TransferCase], None]):
    check(CASES[name](way))


# ---- batches -------------------------------------------------------------------------------------------------

MODEL = Spec("k and v", torch.bfloat16, 3, 16, 2, 8, 0)


@pytest.mark.parametrize("way", MOVERS)
@pytest.mark.parametrize("only", [None, 0, 2])
def test_many_chunks_go_in_one_batch_all_layers_or_one(way: str, only: int | None):
    caches = build(MODEL, 13, 1)
    transfer = transfer_of([caches.group], 64, MOVERS[way])
    chunks = [memory_for(transfer.shard) for _ in range(3)]
    ids = [(1, 2, 3, 4), (8, 7, 6, 5), (9, 11)]
    jobs = [
        CopyJob([Blocks(0, 1 if len(one) < 4 else 0, one)], lease) for one, (_, lease) in zip(ids, chunks, strict=True)
    ]
    transfer.start_gather(jobs, only).wait()
    reference = ReferenceTransfer([caches.group], 64)
    for job, (memory, _) in zip(jobs, chunks, strict=True):
        wanted, lease = memory_for(transfer.shard)
        reference.gather(job.blocks, lease, False)
        for number, one in enumerate(transfer.shard.ranges):
            part = slice(one.offset, one.offset + one.padded_nbytes)
            same = wanted[part] if only in (None, number) else np.full(one.padded_nbytes, 0xEE)
            assert np.array_equal(memory[part], same)
    before = [one.clone() for one in caches.memory]
    for one in caches.memory:
        one.zero_()
    transfer.start_scatter(jobs, only).wait()
    for number, (one, old) in enumerate(zip(caches.group.caches.values(), before, strict=True)):
        came_back = one.view(torch.int16)[:, 1:10].any()
        assert bool(came_back) == (only in (None, number))
        if came_back:
            moved = [*range(1, 10), 11]
            now, then = one.view(torch.int16), old.view(torch.int16).view(one.shape)
            assert torch.equal(now[:, moved], then[:, moved])
            assert not now[:, [0, 10, 12]].any()


def test_a_batch_is_one_launch_of_a_bounded_number_of_programs():
    caches, launches = build(MODEL, 13, 1), Launches()
    transfer = transfer_of([caches.group], 64, partial(by_kernel, kernel=launches))
    jobs = [CopyJob([Blocks(0, 0, (n, n + 1))], memory_for(transfer.shard)[1]) for n in (1, 5, 9)]
    transfer.start_gather(jobs).wait()
    assert launches.grids == [PROGRAMS]
    transfer.start_gather([CopyJob([Blocks(0, 0, (3,))], jobs[0].lease)], only=1).wait()
    assert launches.grids == [PROGRAMS, 2], "K and V of one block are two tiles"
    transfer.start_gather([CopyJob([Blocks(0, 0, ())], jobs[0].lease)]).wait()
    transfer.start_gather([]).wait()
    assert len(launches.grids) == 2, "nothing to do was launched"


def test_preparing_launches_everything_once_and_copies_nothing():
    caches, launches = build(MODEL, 13, 1), Launches()
    before = [one.clone() for one in caches.memory]
    parts = transfer_of([caches.group], 64, by_copy).parts
    KernelCopier(parts, CPU, PROGRAMS, launches).prepare()
    assert launches.grids == [1, 1]
    assert launches.widths == [16, 16]
    assert all(torch.equal(one, old) for one, old in zip(caches.memory, before, strict=True))


def test_where_no_kernel_can_be_launched_it_is_said_why():
    class NoCompiler:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*_given: object) -> None:
                raise RuntimeError("Failed to find C compiler")

            return launch

    assert refusal(torch.device("cpu"), InterpretedFunction(copy_pages.fn)) == ""
    assert refusal(torch.device("cpu"), NoCompiler()) == (
        "Triton cannot launch a kernel here: Failed to find C compiler"
    )


@pytest.mark.parametrize(
    ("nbytes", "skew", "shift", "width"),
    [(64, 0, 0, 16), (24, 0, 0, 8), (64, 8, 0, 8), (12, 0, 0, 4), (64, 0, 4, 4), (6, 0, 0, 2), (7, 0, 0, 1)],
)
def test_accesses_are_as_wide_as_alignment_allows(nbytes: int, skew: int, shift: int, width: int):
    """`skew` of the engine's memory, `shift` of the chunk's."""
    whole = torch.zeros(9 * nbytes + 64, dtype=torch.uint8)
    start = -whole.data_ptr() % 16 + skew
    cache = whole[start : start + 9 * nbytes].view(9, nbytes)
    launches = Launches()
    transfer = transfer_of([GroupCaches({"l": cache}, 9, 1, 0)], 4, partial(by_kernel, kernel=launches))
    memory = np.zeros(transfer.shard.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 16 + shift
    lease = reachable(memory[at : at + transfer.shard.nbytes], transfer.shard)
    transfer.gather([Blocks(0, 0, (1,))], lease, False)
    assert launches.widths == [width]


def test_pages_of_several_tiles_and_a_rest():
    nbytes = 2 * TILE_NBYTES + 4096 + 3
    cache = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (5, nbytes), np.uint8))
    small = torch.arange(5 * 8, dtype=torch.uint8).view(5, 8)
    transfer = transfer_of([GroupCaches({"large": cache, "small": small}, 5, 1, 0)], 2, by_kernel)
    memory, lease = memory_for(transfer.shard)
    transfer.gather([Blocks(0, 0, (4, 2))], lease, False)
    large, other = transfer.shard.ranges
    assert np.array_equal(memory[: 2 * nbytes], cache[[4, 2]].numpy().ravel())
    assert (memory[2 * nbytes : large.padded_nbytes] == 0xEE).all()
    assert np.array_equal(memory[other.offset : other.offset + 16], small[[4, 2]].numpy().ravel())


@pytest.mark.parametrize("way", MOVERS)
def test_a_layer_of_more_than_two_gib(way: str):
    """The memory is never touched but for two pages, so it is not really there."""
    stride = 640 << 20
    cache = torch.from_numpy(np.zeros(5 * stride, np.uint8)).view(5, stride)[:, :64]
    transfer = transfer_of([GroupCaches({"l": cache}, 5, 1, 0)], 2, MOVERS[way])
    cache[4] = torch.arange(64, dtype=torch.uint8)
    memory, lease = memory_for(transfer.shard)
    transfer.gather([Blocks(0, 1, (4,))], lease, False)
    assert memory[64:128].tolist() == list(range(64))
    assert transfer.scatter(lease, [Blocks(0, 1, (3,))], b"")
    assert torch.equal(cache[3], cache[4])


def test_neighbours_are_one_copy_and_a_copy_ends_with_its_page_locked_piece():
    cache = torch.arange(9 * 64, dtype=torch.int32).to(torch.uint8).view(9, 64)
    driver = Memmove()
    transfer = transfer_of([GroupCaches({"l": cache}, 9, 1, 0)], 8, partial(by_copy, driver=driver))
    _, lease = memory_for(transfer.shard)
    transfer.gather([Blocks(0, 0, (3, 4, 5, 6, 1, 2))], lease, False)
    assert driver.sizes == [256, 128]
    driver.sizes.clear()
    memory, lease = memory_for(transfer.shard, (0, 100, 256))
    transfer.gather([Blocks(0, 0, (3, 4, 5, 6, 7))], lease, False)
    assert driver.sizes == [100, 156, 64]
    assert np.array_equal(memory[:320], cache[3:8].numpy().ravel())


# ---- order ---------------------------------------------------------------------------------------------------


class NotedStream:
    """A stream whose copies are made when they are waited for; it notes what it is asked."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def run(self, start: Callable[[], None]) -> CopyEvent:
        self.events.append(f"{self.name} starts")
        return NotedFlight(self, start)


class NotedFlight:
    def __init__(self, stream: NotedStream, start: Callable[[], None]) -> None:
        self.stream, self.start, self.complete = stream, start, False

    def done(self) -> bool:
        return self.complete

    def wait(self) -> None:
        self.start()
        self.complete = True
        self.stream.events.append(f"{self.stream.name} complete")

    def order(self) -> None:
        self.stream.events.append(f"{self.stream.name} ordered")


def test_each_direction_has_its_stream_and_nothing_is_given_back_before_its_copies_are_complete():
    events: list[str] = []
    cache = torch.arange(9 * 64, dtype=torch.int32).to(torch.uint8).view(9, 64)

    def paths(parts: tuple[Part, ...]) -> tuple[Direction, Direction]:
        return Direction(by_copy(parts), NotedStream("store", events)), Direction(
            by_copy(parts), NotedStream("load", events)
        )

    transfer = DeviceTransfer([GroupCaches({"l": cache}, 9, 1, 0)], 2, paths)
    memory, lease = memory_for(transfer.shard)
    sums = transfer.gather([Blocks(0, 0, (1, 2))], lease, True)
    assert np.array_equal(memory[:128], cache[1:3].numpy().ravel())
    assert events == ["store starts", "store complete"]
    assert transfer.scatter(lease, [Blocks(0, 0, (3, 4))], sums), "summed before its copy had complete"
    assert torch.equal(cache[3:5], cache[1:3])
    assert events[2:] == ["load starts", "load ordered", "load complete"]
    event = transfer.start_scatter([CopyJob([Blocks(0, 0, (5,))], lease)])
    assert not event.done()
    assert len(events) == 6, "a batch waited"


def test_memory_that_is_not_page_locked_is_staged():
    events: list[str] = []
    cache = torch.arange(9 * 64, dtype=torch.int32).to(torch.uint8).view(9, 64)

    def paths(parts: tuple[Part, ...]) -> tuple[Direction, Direction]:
        return Direction(by_copy(parts), NotedStream("store", events)), Direction(
            by_copy(parts), NotedStream("load", events)
        )

    transfer = DeviceTransfer([GroupCaches({"l": cache}, 9, 1, 0)], 2, paths)
    memory, lease = memory_for(transfer.shard, pieces=())
    sums = transfer.gather([Blocks(0, 0, (1, 2))], lease, True)
    assert np.array_equal(memory[:128], cache[1:3].numpy().ravel())
    assert transfer.scatter(lease, [Blocks(0, 0, (3, 4))], sums)
    assert torch.equal(cache[3:5], cache[1:3])
    assert events == []
    with pytest.raises(ValueError, match="not page-locked"):
        transfer.start_gather([CopyJob([Blocks(0, 0, (1,))], lease)])


def test_a_lease_that_ended_is_not_used():
    transfer = transfer_of([build(MODEL, 9, 0).group], 64, by_kernel)
    _, lease = memory_for(transfer.shard)
    lease.close()
    with pytest.raises(LeaseExpired):
        transfer.gather([Blocks(0, 0, (1,))], lease, False)
    with pytest.raises(LeaseExpired):
        transfer.scatter(lease, [Blocks(0, 0, (1,))], b"")
