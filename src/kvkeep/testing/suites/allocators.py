"""What every `Allocator` must do, as functions that a third party can call on its own: one case, one check.

Knows nothing about how an allocator finds its room. Each check raises AssertionError with what is wrong; `CHECKS` are
all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvkeep.core.allocator import Allocator, Extent

CHURN = 4000
T = TypeVar("T")


@dataclass(frozen=True)
class AllocatorCase:
    """`make(count)` gives an empty allocator with room for exactly `count` extents of `size_nbytes`.

    `sizes` are what else it may be asked for; it must be able to lend each of them while it is empty. `granule_nbytes`
    divides every offset. `check` is the allocator's own proof that it adds up, if it has one: what is wrong, or "".
    """

    make: Callable[[int], Allocator]
    size_nbytes: int
    sizes: tuple[int, ...]
    granule_nbytes: int
    check: Callable[[Allocator], str] = lambda allocator: ""


Check = Callable[[AllocatorCase], None]


def check_fill(case: AllocatorCase) -> None:
    """All of an empty space is lent from its low end on, then none is."""
    allocator = case.make(8)
    size = case.size_nbytes
    assert _filled(allocator, size) == [Extent(place * size, size) for place in range(8)], "not from low to high"
    assert (allocator.free_nbytes, allocator.used_nbytes) == (0, 8 * size), "a full space has bytes left"
    assert all(allocator.allocate(nbytes) is None for nbytes in case.sizes), "a full space lends more"
    _adds_up(case, allocator)


def check_sizes(case: AllocatorCase) -> None:
    """An extent is as long as was said, at a multiple of the granule, and its bytes are counted once."""
    allocator = case.make(8)
    for nbytes in (1, case.size_nbytes - 1, case.size_nbytes, *case.sizes):
        said = allocator.extent_nbytes(nbytes)
        extent = allocator.allocate(nbytes)
        assert extent is not None, f"{nbytes} bytes do not fit into an empty space"
        assert extent.nbytes == said, f"{extent} for {nbytes} bytes, where {said} were said"
        assert extent.nbytes >= nbytes, f"{extent} is too short for {nbytes} bytes"
        assert not extent.offset % case.granule_nbytes, f"{extent} is not aligned"
        assert allocator.used_nbytes == extent.nbytes, "the bytes in use are not those of the only extent"
        allocator.free(extent)
        assert allocator.used_nbytes == 0, "bytes are in use after the only extent has come back"


def check_any_order(case: AllocatorCase) -> None:
    """All space is back, whatever the order of the frees."""
    for seed in range(5):
        allocator = case.make(16)
        extents = _filled(allocator, case.size_nbytes)
        for place in np.random.default_rng(seed).permutation(len(extents)):
            allocator.free(extents[place])
            _adds_up(case, allocator)
        assert sorted(_filled(allocator, case.size_nbytes)) == sorted(extents), "some space did not come back"


def check_refused(case: AllocatorCase) -> None:
    """A double free and a foreign extent are an AssertionError, an empty request a ValueError; they change nothing."""
    allocator = case.make(8)
    size, granule = case.size_nbytes, case.granule_nbytes
    first, second, *rest = _filled(allocator, size)
    allocator.free(second)
    wrong = [second, Extent(first.offset, 2 * size), Extent(-size, size), Extent(8 * size, size)]
    wrong += [Extent(first.offset + granule, size), Extent(first.offset, size + granule), Extent(first.offset, 0)]
    for extent in wrong:
        assert _refuses(allocator.free, extent), f"a free of {extent} passes, which is not lent"
    for nbytes in (0, -1):
        assert _refuses(allocator.allocate, nbytes), f"{nbytes} bytes can be had"
    _adds_up(case, allocator)
    assert allocator.used_nbytes == 7 * size, "what was refused changed the bytes in use"
    for extent in (first, *rest):
        allocator.free(extent)
    assert allocator.used_nbytes == 0, "what was refused cannot be freed any more"


def check_growth(case: AllocatorCase) -> None:
    """Grown space lies behind what there is; a freed extent comes before it or after it, but comes."""
    allocator = case.make(4)
    before = _filled(allocator, case.size_nbytes)
    allocator.grow(case.size_nbytes)
    assert allocator.free_nbytes == case.size_nbytes, "grown bytes are not free"
    assert allocator.allocate(case.size_nbytes) == Extent(4 * case.size_nbytes, case.size_nbytes), "not at the end"
    assert allocator.allocate(case.size_nbytes) is None, "more was grown than was asked for"
    allocator.free(before[1])
    assert allocator.allocate(case.size_nbytes) == before[1], "the only hole is not lent"
    _adds_up(case, allocator)


def check_nothing_aliases(case: AllocatorCase) -> None:
    """In a long random run no byte is ever lent twice, and the bytes in use are those of the extents."""
    draw = np.random.default_rng(1)
    sizes = [case.size_nbytes, *case.sizes]
    allocator = case.make(64)
    owners = bytearray(64 * case.size_nbytes // case.granule_nbytes)  # one flag a granule
    lent: list[Extent] = []
    for step in range(CHURN):
        if lent and draw.random() < (0.6 if step % 500 > 250 else 0.4):
            extent = lent.pop(int(draw.integers(len(lent))))
            allocator.free(extent)
            _mark(owners, extent, case.granule_nbytes, 0)
        elif (got := allocator.allocate(sizes[int(draw.integers(len(sizes)))])) is not None:
            _mark(owners, got, case.granule_nbytes, 1)
            lent.append(got)
        assert allocator.used_nbytes == sum(extent.nbytes for extent in lent), "the bytes in use do not add up"
    _adds_up(case, allocator)


CHECKS: tuple[Check, ...] = (
    check_fill,
    check_sizes,
    check_any_order,
    check_refused,
    check_growth,
    check_nothing_aliases,
)


def _adds_up(case: AllocatorCase, allocator: Allocator) -> None:
    problem = case.check(allocator)
    assert not problem, problem


def _filled(allocator: Allocator, nbytes: int) -> list[Extent]:
    extents = []
    while (extent := allocator.allocate(nbytes)) is not None:
        extents.append(extent)
    return extents


def _refuses(action: Callable[[T], object], argument: T) -> bool:
    try:
        action(argument)
    except (AssertionError, ValueError):
        return True
    return False


def _mark(owners: bytearray, extent: Extent, granule: int, flag: int) -> None:
    """Set the flags of an extent's granules, all of which must be the other way."""
    first, last = extent.offset // granule, -(-(extent.offset + extent.nbytes) // granule)
    assert 0 <= first < last <= len(owners), f"{extent} is outside of the space"
    assert owners[first:last] == bytes([1 - flag]) * (last - first), f"{extent} overlaps another one"
    owners[first:last] = bytes([flag]) * (last - first)
