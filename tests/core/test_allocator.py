from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.allocator import Allocator, Extent, FreeList
from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.testing.suites.allocators import CHECKS, AllocatorCase, check_refused

PAGE = ALIGN_NBYTES
SLOT = 3 * PAGE


def grown(allocator: Allocator, count: int) -> Allocator:
    for _ in range(count * SLOT // PAGE):
        allocator.grow(PAGE)
    return allocator


ANY_SIZE = (PAGE, PAGE + 1, 2 * PAGE, SLOT + 1, 5 * PAGE)
CASES = {
    "free list": AllocatorCase(lambda count: FreeList(count * SLOT), SLOT, ANY_SIZE, PAGE, FreeList.check),
    "grown free list": AllocatorCase(lambda count: grown(FreeList(), count), SLOT, ANY_SIZE, PAGE, FreeList.check),
}


def fill(allocator: Allocator, nbytes: int) -> list[Extent]:
    extents = []
    while (extent := allocator.allocate(nbytes)) is not None:
        extents.append(extent)
    return extents


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_conforms(name, check):
    check(CASES[name])


class Careless:
    """A free list that forgets what it has lent, so that a freed extent can be freed again."""

    def __init__(self, nbytes: int) -> None:
        self._list = FreeList(nbytes)
        self.extent_nbytes, self.allocate, self.grow = self._list.extent_nbytes, self._list.allocate, self._list.grow

    free_nbytes = property(lambda self: self._list.free_nbytes)
    used_nbytes = property(lambda self: self._list.used_nbytes)

    def free(self, extent: Extent) -> None:
        self._list._lent[extent.offset] = extent.nbytes
        self._list.free(extent)


def test_the_suite_finds_an_allocator_that_takes_an_extent_twice():
    case = AllocatorCase(lambda count: Careless(count * SLOT), SLOT, ANY_SIZE, PAGE)
    with pytest.raises(AssertionError, match="which is not lent"):
        check_refused(case)


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
    assert free_list.check() == ""


def test_a_free_tail_grows_with_the_space():
    free_list = FreeList(4 * PAGE)
    kept = free_list.allocate(PAGE)
    assert free_list.allocate(5 * PAGE) is None
    free_list.grow(2 * PAGE)
    assert free_list.allocate(5 * PAGE) == Extent(kept.nbytes, 5 * PAGE)


def test_an_unaligned_growth_is_refused():
    with pytest.raises(ValueError, match="not aligned"):
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
        assert free_list.check() == ""
        assert len(fill(free_list, PAGE)) == len(extents)


# ---- any sequence of calls, against a map of bytes


class AllocatorMachine(RuleBasedStateMachine):
    """The model is the list of lent extents; no two may share a page, and a refusal must be true."""

    @initialize(npages=st.integers(1, 40))
    def start(self, npages):
        self.allocator = FreeList()
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
            assert self.allocator.check() == ""
            assert self.allocator.used_nbytes == sum(extent.nbytes for extent in self.lent)
            assert self.allocator.used_nbytes + self.allocator.free_nbytes == self.npages * PAGE

    def longest_hole(self) -> int:
        ends = [0, *(extent.offset + extent.nbytes for extent in sorted(self.lent))]
        starts = [*(extent.offset for extent in sorted(self.lent)), self.npages * PAGE]
        return max(start - end for start, end in zip(starts, ends, strict=True))


TestAnySequence = AllocatorMachine.TestCase
TestAnySequence.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
