"""A scatter that turns K on its way, in Triton's interpreter, beside the plain scatter and torch's turn in place."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from kvkeep.errors import LayoutMismatch
from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.device import HeldDevice
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.device.tables import CopyJob
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.keys import Alike, Batch, Keys, Rotator
from kvkeep.transfer.rope.rotate import Pairing, Rotation, key_pages, rotate, rotation_between
from kvkeep.transfer.rope.scatter import RotatingScatter, scatter_rotated
from kvkeep.transfer.transfer import Blocks

BLOCKS, TOKENS, PER_CHUNK = 9, 4, 3
MOVED = partial(RotatingScatter, kernel=InterpretedFunction(scatter_rotated.fn))
HALVES = Pairing()
AXES = ("2bthd", "b2thd", "b2htd", "bthd")


class Model:
    """Two layers' caches of one layout, all bits in use, and two chunks in the pool."""

    def __init__(self, axes: str, dtype: torch.dtype, heads: int, head_size: int) -> None:
        sizes = {"2": 2, "b": BLOCKS, "t": TOKENS, "h": heads, "d": head_size}
        shape = [sizes[axis] for axis in axes]
        random = torch.Generator().manual_seed(1)
        self.axes = axes
        self.caches = {f"l{n}": torch.randn(shape, generator=random).to(dtype) for n in range(2)}
        self.group = GroupCaches(self.caches, BLOCKS, TOKENS, 0)
        self.device = HeldDevice(make_rotating=MOVED)
        self.transfer: DeviceTransfer = self.device.transfer([self.group], PER_CHUNK * TOKENS)
        shard = self.transfer.shard
        self.memory = [np.zeros(shard.nbytes, np.uint8) for _ in range(2)]
        for memory, ids in zip(self.memory, ((1, 2, 3), (4, 5, 6)), strict=True):
            self.transfer.gather([Blocks(0, 0, ids)], Lease(memory, shard, (0,)), False)
        for cache in self.caches.values():
            cache.zero_()

    def jobs(self, *blocks: Blocks) -> list[CopyJob]:
        leases = [Lease(memory, self.transfer.shard, (0,)) for memory in self.memory]
        return [CopyJob([one], lease) for one, lease in zip(blocks, leases, strict=False)]

    def alike(self, rotation: Rotation, pairing: Pairing = HALVES) -> Alike:
        keys = dict.fromkeys(self.caches, Keys(self.axes, torch.zeros(rotation.cos.shape[1]), pairing))
        (alike,) = Rotator([self.group], self.transfer.shard, keys).alike
        assert len(alike.planes) == (4 if "2" in self.axes else 2)
        return alike

    def in_two(
        self, jobs: list[CopyJob], rotation: Rotation, pairing: Pairing, ids: list[int], only: int | None
    ) -> list[torch.Tensor]:
        """What a plain scatter and a turn in place make of it; the caches are empty again afterwards."""
        self.transfer.start_scatter(jobs, only).wait()
        for number, (name, cache) in enumerate(self.caches.items()):
            if only in (None, number):
                pages = key_pages(name, cache, self.axes)
                rotated = rotate(pages[ids].flatten(0, 1).float(), rotation, pairing).view_as(pages[ids])
                pages[ids] = cut_off(rotated) if pages.dtype == torch.bfloat16 else rotated.to(pages.dtype)
        made = [one.clone() for one in self.caches.values()]
        for cache in self.caches.values():
            cache.zero_()
        return made


def cut_off(numbers: torch.Tensor) -> torch.Tensor:
    """Float32 to bfloat16 as Triton's interpreter does it; a device rounds (see test_compiled)."""
    return (numbers.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def rotation_of(tokens: int, pairs: int) -> Rotation:
    pace = frequencies({"rope_theta": 10_000.0}, 2 * pairs, Span(512))
    p = torch.arange(tokens)
    return rotation_between((p, pace), (p + 77, pace))


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(ones, others, strict=True)
    )


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(
    axes=st.sampled_from(AXES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 6),
    rest=st.integers(0, 5),
    start=st.integers(0, 5),
    interleaved=st.booleans(),
    only=st.sampled_from([None, 0, 1]),
)
def test_it_is_a_scatter_and_a_turn_in_one(
    axes: str, dtype: torch.dtype, heads: int, pairs: int, rest: int, start: int, interleaved: bool, only: int | None
) -> None:
    model = Model(axes, dtype, heads, 2 * pairs + rest)
    jobs = model.jobs(Blocks(0, 0, (7, 8, 2)), Blocks(0, 1, (4, 1)))
    rotation, pairing = rotation_of(5 * TOKENS, pairs), Pairing(interleaved, min(start, rest))
    wanted = model.in_two(jobs, rotation, pairing, [7, 8, 2, 4, 1], only)
    event = model.transfer.start_rotated(jobs, Batch(only, model.alike(rotation, pairing), rotation))
    assert not any(one.any() for one in model.caches.values()), "not on the loads' stream"
    event.wait()
    assert same(list(model.caches.values()), wanted)


def test_what_does_not_turn_is_copied_bit_for_bit() -> None:
    model = Model("2bthd", torch.float16, 1, 8)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -2.0, 6e-8]).half()
    for part in model.transfer.parts:
        for memory in model.memory:
            view = memory[part.offset : part.offset + PER_CHUNK * part.pages.nbytes]
            view[:] = np.tile(odd.numpy().view(np.uint8), len(view) // 16)
    jobs = model.jobs(Blocks(0, 0, (3,)))
    rotation = rotation_of(TOKENS, 4)
    model.transfer.start_rotated(jobs, Batch(None, model.alike(rotation), rotation)).wait()
    for cache in model.caches.values():
        assert cache[1, 3].contiguous().view(torch.int16).flatten().tolist() == odd.view(torch.int16).tolist() * TOKENS
        assert cache[0, 3].isnan().any(), "K has turned infinities"


@pytest.mark.parametrize("blocks", [(), (Blocks(0, 0, ()),)])
def test_no_block_is_nothing_to_do(blocks: tuple[Blocks, ...]) -> None:
    model = Model("2bthd", torch.float32, 1, 8)
    jobs = model.jobs(*blocks)
    rotation = rotation_of(0, 4)
    model.transfer.start_rotated(jobs, Batch(None, model.alike(rotation), rotation)).wait()
    assert not any(one.any() for one in model.caches.values())


def test_what_it_cannot_do_is_refused() -> None:
    model = Model("2bthd", torch.float32, 1, 8)
    jobs = model.jobs(Blocks(0, 0, (3,)))
    rotation, parts = rotation_of(TOKENS, 4), model.transfer.parts
    with pytest.raises(ValueError, match="as they were computed"):
        MOVED(parts, model.alike(rotation), rotation).start(jobs, True, None)
    with pytest.raises(ValueError, match="not for these blocks"):
        MOVED(parts, model.alike(rotation), rotation_of(3, 4)).start(jobs, False, None)
    with pytest.raises(LayoutMismatch, match="do not fit"):
        MOVED(parts, model.alike(rotation), rotation_of(TOKENS, 5))
    alike = model.alike(rotation)
    alike.planes[0] = alike.planes[0]._replace(pages=alike.planes[0].pages.to(torch.float8_e4m3fn))
    with pytest.raises(LayoutMismatch, match="float8"):
        MOVED(parts, alike, rotation)
