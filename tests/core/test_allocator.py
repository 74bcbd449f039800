from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.allocator import ALIGNMENT, Allocator, Extent, FreeList, Slots

PAGE = ALIGNMENT
SLOT = 3 * PAGE
COUNT = 8

Make = Callable[[], FreeList | Slots]
MAKERS: dict[str, Make] = {
    "free list": lambda: FreeList(COUNT * SLOT),
    "slots": lambda: Slots(SLOT, COUNT),
    "grown free list": lambda: grown(FreeList()),
    "grown slots": lambda: grown(Slots(SLOT)),
}


def grown(allocator: FreeList | Slots) -> FreeList | Slots:
    for _ in range(COUNT * SLOT // PAGE):
        allocator.grow(PAGE)
    return allocator


@pytest.fixture(params=list(MAKERS))
def allocator(request: pytest.FixtureRequest) -> FreeList | Slots:
    return MAKERS[request.param]()


def fill(allocator: Allocator, nbytes: int) -> list[Extent]:
    extents = []
    while (extent := allocator.allocate(nbytes)) is not None:
        extents.append(extent)
    return extents


# ---- what every allocator promises


def test_lends_all_of_its_space_from_the_low_end_and_then_says_none(allocator):
    assert fill(allocator, SLOT) == [Extent(at * SLOT, SLOT) for at in range(COUNT)]
    assert (allocator.free_nbytes, allocator.used_nbytes) == (0, COUNT * SLOT)
    assert allocator.allocate(1) is None
    allocator.check()


def test_an_extent_is_as_long_as_was_said(allocator):
    for nbytes in (1, PAGE - 1, PAGE, PAGE + 1, SLOT):
        extent = allocator.allocate(nbytes)
        assert extent.nbytes == allocator.extent_nbytes(nbytes) >= nbytes
        assert allocator.used_nbytes == extent.nbytes
        allocator.free(extent)
        assert allocator.used_nbytes == 0


def test_all_space_is_back_whatever_the_order_of_the_frees(allocator):
    extents = fill(allocator, SLOT)
    random.Random(7).shuffle(extents)
    for extent in extents:
        allocator.free(extent)
        allocator.check()
    assert len(fill(allocator, SLOT)) == COUNT


def test_growing_adds_room_behind_what_there_is(allocator):
    before = fill(allocator, SLOT)
    allocator.grow(SLOT)
    assert allocator.allocate(SLOT) == Extent(COUNT * SLOT, SLOT)
    assert allocator.allocate(SLOT) is None
    allocator.free(before[0])
    assert allocator.allocate(SLOT) == before[0]
    allocator.check()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_request_is_a_broken_invariant(allocator, nbytes):
    with pytest.raises(AssertionError, match="at least one byte"):
        allocator.allocate(nbytes)


def test_a_double_free_is_a_broken_invariant(allocator):
    first, second, _ = (allocator.allocate(SLOT) for _ in range(3))
    allocator.free(first)
    with pytest.raises(AssertionError, match="not lent"):
        allocator.free(first)
    allocator.free(second)
    with pytest.raises(AssertionError, match="not lent"):
        allocator.free(second)
    allocator.check()
    assert allocator.used_nbytes == SLOT


@pytest.mark.parametrize(
    "foreign",
    [Extent(0, 2 * SLOT), Extent(0, PAGE), Extent(PAGE, SLOT), Extent(-SLOT, SLOT), Extent(COUNT * SLOT, SLOT)],
)
def test_a_foreign_extent_is_a_broken_invariant(allocator, foreign):
    fill(allocator, SLOT)
    with pytest.raises(AssertionError, match="not lent"):
        allocator.free(foreign)
    allocator.check()
    assert allocator.free_nbytes == 0


# ---- the free list


def test_example_splits_reuses_and_coalesces():
    free_list = FreeList(1 << 20)
    first = free_list.allocate(1)
    second = free_list.allocate(5000)
    third = free_list.allocate(4096)
    assert [first, second, third] == [Extent(0, 4096), Extent(4096, 8192), Extent(12288, 4096)]
    free_list.free(second)
    assert free_list.allocate(4097) == second
    for extent in (third, first, second):
        free_list.free(extent)
    assert free_list.allocate(1 << 20) == Extent(0, 1 << 20)


def test_takes_the_smallest_hole_that_fits_and_of_equal_ones_the_lowest():
    free_list = FreeList()
    free_list.grow(64 * PAGE)
    pages = {name: [] for name in ("hole", "wall")}
    for npages in (5, 2, 3, 2, 3, 2):
        pages["hole"].append(free_list.allocate(npages * PAGE))
        pages["wall"].append(free_list.allocate(PAGE))
    for extent in reversed(pages["hole"]):
        free_list.free(extent)
    five, two, three, another_two, another_three, last_two = pages["hole"]
    assert [free_list.allocate(2 * PAGE) for _ in range(3)] == [two, another_two, last_two]
    assert [free_list.allocate(2 * PAGE).offset for _ in range(2)] == [three.offset, another_three.offset]
    assert free_list.allocate(4 * PAGE).offset == five.offset
    free_list.check()


def test_a_free_tail_grows_with_the_space():
    free_list = FreeList(4 * PAGE)
    kept = free_list.allocate(PAGE)
    assert free_list.allocate(5 * PAGE) is None
    free_list.grow(2 * PAGE)
    assert free_list.allocate(5 * PAGE) == Extent(kept.nbytes, 5 * PAGE)


def test_an_unaligned_growth_is_a_broken_invariant():
    with pytest.raises(AssertionError, match="not aligned"):
        FreeList(PAGE).grow(PAGE + 1)


def test_leavings_of_swallowed_holes_stay_fewer_than_a_multiple_of_the_holes():
    free_list = FreeList(4096 * PAGE)
    extents = fill(free_list, PAGE)
    order = random.Random(3)
    for _ in range(3):
        order.shuffle(extents)
        for extent in extents:
            free_list.free(extent)
            assert free_list._listed + len(free_list._sizes) <= 3 * len(free_list._holes) + 64
        free_list.check()
        assert len(fill(free_list, PAGE)) == len(extents)


# ---- slots


def test_the_slot_freed_last_is_lent_first():
    slots = Slots(SLOT, COUNT)
    first, second, _ = (slots.allocate(SLOT) for _ in range(3))
    slots.free(second)
    slots.free(first)
    assert [slots.allocate(SLOT) for _ in range(3)] == [first, second, Extent(3 * SLOT, SLOT)]


def test_more_than_a_slot_never_fits():
    slots = Slots(SLOT, COUNT)
    assert slots.extent_nbytes(SLOT + 1) is None
    assert slots.allocate(SLOT + 1) is None
    assert slots.used_nbytes == 0


# ---- any sequence of calls, against a map of bytes


class AllocatorMachine(RuleBasedStateMachine):
    """The model is the list of lent extents; no two may share a page, and a refusal must be true."""

    @initialize(make=st.sampled_from([FreeList, lambda: Slots(SLOT)]), npages=st.integers(1, 40))
    def start(self, make, npages):
        self.allocator = make()
        self.allocator.grow(npages * PAGE)
        self.npages = npages
        self.lent: list[Extent] = []

    @rule(npages=st.integers(1, 20))
    def grow(self, npages):
        self.allocator.grow(npages * PAGE)
        self.npages += npages

    @rule(nbytes=st.integers(1, 6 * PAGE))
    def allocate(self, nbytes):
        extent = self.allocator.allocate(nbytes)
        if extent is None:
            size = self.allocator.extent_nbytes(nbytes)
            assert size is None or self.longest_hole() < size
            return
        assert extent.nbytes >= nbytes
        assert 0 <= extent.offset <= self.npages * PAGE - extent.nbytes
        assert all(
            extent.offset + extent.nbytes <= other.offset or other.offset + other.nbytes <= extent.offset
            for other in self.lent
        )
        self.lent.append(extent)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def free(self, data):
        extent = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        self.allocator.free(extent)
        with pytest.raises(AssertionError):
            self.allocator.free(extent)

    @invariant()
    def adds_up(self):
        if hasattr(self, "allocator"):
            self.allocator.check()
            assert self.allocator.used_nbytes == sum(extent.nbytes for extent in self.lent)
            granule = SLOT if isinstance(self.allocator, Slots) else PAGE
            whole = self.npages * PAGE // granule * granule
            assert self.allocator.used_nbytes + self.allocator.free_nbytes == whole

    def longest_hole(self) -> int:
        ends = [0, *(extent.offset + extent.nbytes for extent in sorted(self.lent))]
        starts = [*(extent.offset for extent in sorted(self.lent)), self.npages * PAGE]
        return max(start - end for start, end in zip(starts, ends, strict=True))


TestAnySequence = AllocatorMachine.TestCase
TestAnySequence.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
