"""The ledger against a model that counts bytes one by one."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.policies.queue import lru
from kvkeep.tiers.disk.ledger import Ledger, LedgerEntry

LIMIT = 10
NUMBERS = st.integers(0, 7)
PICK = st.integers(0, 1000)


def name(number: int) -> bytes:
    return bytes([number])


class LedgerMachine(RuleBasedStateMachine):
    """What is on the device: names by key, temporary files, unlinked files with readers; each with its bytes."""

    @initialize(left=st.dictionaries(NUMBERS, st.integers(1, 3), max_size=4))
    def start(self, left: dict[int, int]) -> None:
        self.names = {name(number): nbytes for number, nbytes in left.items()}
        self.old = dict(self.names)
        self.ledger = Ledger(LIMIT, lru(), sum(left.values()))
        self.temporary: list[tuple[bytes, int]] = []
        self.readers: list[LedgerEntry] = []
        self.settled = False

    def device_nbytes(self) -> int:
        open_unlinked = {id(entry): entry.nbytes for entry in self.readers if entry.unlinked}
        return sum(self.names.values()) + sum(n for _, n in self.temporary) + sum(open_unlinked.values())

    @rule(number=NUMBERS, nbytes=st.integers(1, 4))
    def write(self, number: int, nbytes: int) -> None:
        key = name(number)
        if key in self.ledger.live or key in self.ledger.dying or key in [one for one, _ in self.temporary]:
            return
        if self.ledger.reserve(nbytes):
            self.temporary.append((key, nbytes))
        elif self.settled:
            before = set(self.ledger.live)
            victims = self.ledger.evict(nbytes)
            assert before == set(self.ledger.live) | {one.key for one in victims}
            assert all(not one.readers for one in victims)
            assert not victims or self.ledger.shortage_nbytes(nbytes) <= sum(one.nbytes for one in victims)

    @precondition(lambda self: self.temporary)
    @rule(pick=PICK, ends=st.booleans())
    def finish(self, pick: int, ends: bool) -> None:
        key, nbytes = self.temporary.pop(pick % len(self.temporary))
        if not ends:
            self.ledger.unreserve(nbytes)
        elif key in self.names:  # an old record that nobody knew yet
            self.ledger.unreserve(nbytes)
            self.ledger.learn(key, self.names[key])
        else:
            self.names[key] = nbytes
            self.ledger.publish(key, nbytes, nbytes)

    @precondition(lambda self: self.ledger.live)
    @rule(pick=PICK, what=st.sampled_from(["touch", "read", "delete"]))
    def use(self, pick: int, what: str) -> None:
        entry = sorted(self.ledger.live.values(), key=lambda one: one.key)[pick % len(self.ledger.live)]
        if what == "touch":
            self.ledger.touch(entry)
        elif what == "read":
            self.ledger.pin(entry)
            self.readers.append(entry)
        else:
            self.ledger.kill(entry)

    @precondition(lambda self: self.readers)
    @rule(pick=PICK)
    def close(self, pick: int) -> None:
        self.ledger.unpin(self.readers.pop(pick % len(self.readers)))

    @precondition(lambda self: self.ledger.dying)
    @rule(pick=PICK)
    def unlink(self, pick: int) -> None:
        entry = sorted(self.ledger.dying.values(), key=lambda one: one.key)[pick % len(self.ledger.dying)]
        self.names.pop(entry.key, None)
        self.ledger.forget(entry, entry.nbytes)

    @precondition(lambda self: not self.settled)
    @rule()
    def begin_scan(self) -> None:
        for key, nbytes in self.old.items():  # a list made at the start: some of it is gone or replaced
            if key not in [one for one, _ in self.temporary]:
                self.ledger.adopt(key, nbytes)
        if any(key in self.names and key not in self.ledger.live and key not in self.ledger.dying for key in self.old):
            return  # the drive waits for those
        self.ledger.settle()
        self.settled = True

    @invariant()
    def bytes_are_within_the_limit(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.device_nbytes() <= self.ledger.used_nbytes <= LIMIT + sum(self.old.values())
        if self.settled:
            known = set(self.ledger.live) | set(self.ledger.dying)
            assert set(self.names) <= known
            assert self.ledger.used_nbytes == self.device_nbytes()


TestLedger = LedgerMachine.TestCase


def test_the_used_go_last_and_old_ones_first() -> None:
    ledger = Ledger(6, lru(), 3)
    for number in (1, 2):
        assert ledger.reserve(1)
        ledger.publish(name(number), 1, 1)
    ledger.touch(ledger.live[name(1)])
    for number in (7, 8, 9):
        ledger.adopt(name(number), 1)
    ledger.settle()
    ledger.touch(ledger.live[name(8)])
    assert [key[0] for key in ledger.order()] == [7, 9, 2, 1, 8]


def test_nothing_is_evicted_for_what_cannot_fit() -> None:
    ledger = Ledger(4, lru(), 0)
    ledger.settle()
    for number in range(4):
        assert ledger.reserve(1)
        ledger.pin(ledger.publish(name(number), 1, 1))
    ledger.unpin(ledger.live[name(2)])
    assert ledger.evict(2) == []
    assert [one.key for one in ledger.evict(1)] == [name(2)]
    assert not ledger.reserve(1), "its file is still there"


def test_free_space_of_the_file_system_counts_too() -> None:
    ledger = Ledger(100, lru(), 0)
    ledger.settle()
    ledger.spare_nbytes = 3
    assert ledger.reserve(2)
    ledger.publish(name(1), 2, 2)
    assert not ledger.reserve(2)
    assert [one.key for one in ledger.evict(2)] == [name(1)]


def test_a_record_that_ends_twice_is_a_bug() -> None:
    ledger = Ledger(4, lru(), 0)
    ledger.settle()
    assert ledger.reserve(1)
    entry = ledger.publish(name(1), 1, 1)
    ledger.kill(entry)
    with pytest.raises(AssertionError):
        ledger.kill(entry)
