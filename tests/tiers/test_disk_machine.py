"""Random operations on a disk tier with random faults, against a model: the right bytes or a miss, space to the byte."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvkeep.config import Disk
from kvkeep.errors import TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk, flip_bit
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.disk.disk import open_disk
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Stored

T = TypeVar("T")
WRITES = [write_of(key(number, namespace=1 + number % 2), (4096,) * (1 + number % 3)) for number in range(8)]
LIMIT = 90_000  # five or six records
NUMBERS = st.integers(0, len(WRITES) - 1)
SOME = st.lists(NUMBERS, max_size=5)
CALLS = ("create", "open", "readv", "writev", "stat", "publish", "unlink", "mkdir", "sync", "free", "replace")


class DiskMachine(RuleBasedStateMachine):
    """The model: `may_hold` are the chunks that may be given back; all others must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="kvkeep-machine-")
        self.loop = asyncio.new_event_loop()
        self.clock = count(1)
        self.may_hold: set[int] = set()
        self.most = 0
        self.failing: dict[str, int] = {}
        self.start()

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(call, 20))

    def start(self) -> None:
        self.failing.clear()
        self.disk = FaultyDisk(fault=lambda call, _: self.failing.get(call, 0), after=self.look)
        options = Disk(path=(self.root,), size=LIMIT, min_free=0, threads=2)
        self.tier = self.do(open_disk(options, self.disk.files, lambda: next(self.clock)))

    def look(self) -> None:
        self.most = max(self.most, self.disk.allocated_nbytes(self.root))

    def path(self, number: int) -> str:
        one = WRITES[number].key
        return f"{self.root}/{one[:16].hex()}/{one[16:17].hex()}/{one[16:].hex()}"

    @rule(numbers=SOME)
    def store(self, numbers: list[int]) -> None:
        stored = self.do(self.tier.store([WRITES[number] for number in numbers]))
        self.may_hold |= {number for number, one in zip(numbers, stored, strict=True) if one is not Stored.REFUSED}

    @rule(numbers=SOME)
    def load(self, numbers: list[int]) -> None:
        for number in numbers:  # `holds` compares the bytes
            there = self.do(holds(self.tier, WRITES[number]))
            assert not there or number in self.may_hold, "what was forgotten is back"
            if not there and not self.failing:
                self.may_hold.discard(number)

    @rule(stored=SOME, loaded=SOME, deleted=SOME)
    def all_at_once(self, stored: list[int], loaded: list[int], deleted: list[int]) -> None:
        async def at_once() -> None:
            await asyncio.gather(
                self.tier.store([WRITES[number] for number in stored]),
                self.tier.delete([WRITES[number].key for number in deleted]),
                *(holds(self.tier, WRITES[number]) for number in loaded),
            )

        self.do(at_once())
        self.may_hold |= set(stored)

    @rule(stored=st.lists(SOME, min_size=2, max_size=4), removed=SOME, cut=SOME, after=st.integers(0, 20))
    def removed_while_several_store(
        self, stored: list[list[int]], removed: list[int], cut: list[int], after: int
    ) -> None:
        """Somebody removes and cuts records, some before several stores at once and some while they run."""
        at, look = self.disk.calls + after, self.disk.after

        def disturb(some: list[int], call: Callable[[str], None]) -> None:
            for number in some:
                if os.path.exists(path := self.path(number)):
                    call(path)

        def meanwhile() -> None:
            look()
            if self.disk.calls == at:
                disturb(removed, os.unlink)
                disturb(cut, lambda path: os.truncate(path, 0))

        async def at_once() -> None:
            await asyncio.gather(*(self.tier.store([WRITES[number] for number in some]) for some in stored))

        disturb(cut, os.unlink)
        self.disk.after = meanwhile
        self.do(at_once())
        self.disk.after = look
        self.may_hold |= {number for some in stored for number in some}
        self.may_hold -= {number for number in range(len(WRITES)) if not os.path.exists(self.path(number))}
        assert self.tier.figures().used_nbytes >= 0

    @rule(numbers=SOME)
    def delete(self, numbers: list[int]) -> None:
        self.do(self.tier.delete([WRITES[number].key for number in numbers]))
        if not self.failing:
            self.may_hold -= set(numbers)
        assert not any(self.do(self.tier.contains([WRITES[number].key for number in numbers])))

    @rule(which=st.sampled_from([0, 1, None]))
    def clear(self, which: int | None) -> None:
        gone = {number for number in range(len(WRITES)) if which is None or number % 2 == which}
        try:
            self.do(self.tier.clear(None if which is None else WRITES[which].key[:16]))
        except TierUnavailable:
            assert self.failing
            assert not any(self.do(holds(self.tier, WRITES[number])) for number in gone)
        else:
            self.may_hold -= gone

    @rule(number=NUMBERS, bit=st.integers(0, 8 * 20_000))
    def flip(self, number: int, bit: int) -> None:
        if os.path.exists(path := self.path(number)) and (
            nbytes := os.path.getsize(path)
        ):  # it may have been cut to none
            flip_bit(path, bit % (8 * nbytes))  # a second time makes it good again

    @rule(number=NUMBERS, nbytes=st.integers(0, 20_000))
    def truncate(self, number: int, nbytes: int) -> None:
        if os.path.exists(path := self.path(number)) and nbytes < os.path.getsize(path):
            os.truncate(path, nbytes)
            self.may_hold.discard(number)

    @rule(one=NUMBERS, other=NUMBERS)
    def swap(self, one: int, other: int) -> None:
        paths = [self.path(one), self.path(other)]
        if one != other and all(map(os.path.exists, paths)):
            os.rename(paths[0], f"{self.root}/aside")
            os.rename(paths[1], paths[0])
            os.rename(f"{self.root}/aside", paths[1])

    @rule(number=NUMBERS)
    def vanish(self, number: int) -> None:
        if os.path.exists(path := self.path(number)):
            os.unlink(path)
            self.may_hold.discard(number)

    @precondition(lambda self: not self.failing)
    @rule(call=st.sampled_from(CALLS), code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]))
    def fail(self, call: str, code: int) -> None:
        self.failing[call] = code

    @precondition(lambda self: self.failing)
    @rule()
    def heal(self) -> None:
        self.failing.clear()

    @rule(short=st.sampled_from([0, 4096, 8192]))
    def shorten(self, short: int) -> None:
        self.disk.short = short

    @rule(killed=st.booleans(), at_once=st.booleans())
    def restart(self, killed: bool, at_once: bool) -> None:
        if killed:
            self.disk.kill_at = 0
        self.do(self.tier.aclose())
        self.start()
        if not at_once:
            self.do(self.tier.wait_for_scan())
        # A delete is not made durable against failing unlinks: such a chunk, never wrong, may be back.

    @rule(numbers=SOME, after=st.integers(1, 12))
    def killed_while_storing(self, numbers: list[int], after: int) -> None:
        self.disk.kill_at = self.disk.calls + after
        self.do(self.tier.store([WRITES[number] for number in numbers]))
        self.may_hold |= set(numbers)
        self.restart(True, False)

    @rule()
    def is_exact(self) -> None:
        """Without faults, and with everything known: not a byte is leaked, and the limit was kept all the time."""
        self.failing.clear()
        self.do(self.tier.wait_for_scan())
        self.load(list(range(len(WRITES))))
        self.do(self.tier.store([]))  # what could not be removed is tried again
        figures = self.tier.figures()
        assert figures.stalled == 0
        assert figures.used_nbytes == self.disk.allocated_nbytes(self.root) <= LIMIT
        assert self.most <= LIMIT, "the limit was not kept at some moment"
        for number in range(len(WRITES)):
            [stored] = self.do(self.tier.store([WRITES[number]]))
            assert stored is not Stored.REFUSED, "a key cannot be stored again"
            assert self.do(holds(self.tier, WRITES[number]))
            self.may_hold.add(number)

    def teardown(self) -> None:
        try:
            self.is_exact()
        finally:
            self.do(self.tier.aclose())
            self.loop.close()
            shutil.rmtree(self.root)


class TestDisk(DiskMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=8, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestDiskAtLength(DiskMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_limit_of_the_machine_makes_it_evict() -> None:
    assert sum(record_nbytes(one.sizes) for one in WRITES) > LIMIT
