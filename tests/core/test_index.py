from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import BUSY, NO_ROOM, PRESENT, Index, IndexEntry
from kvkeep.core.policies.queue import fifo, lru
from kvkeep.core.policies.ranked import lfu, mru
from kvkeep.core.units import ALIGN_NBYTES

PAGE = ALIGN_NBYTES
SIZE = 2 * PAGE
SUMS = b"s" * 16
NAMESPACES = [b"n" * 16, b"m" * 16]
KEYS = [namespace + bytes([digest]) * 32 for namespace in NAMESPACES for digest in range(5)]


def make(count: int, policy=lru) -> Index:
    return Index(FreeList(count * SIZE), policy())


def write(index: Index, keys: list[bytes], nbytes: int = SIZE) -> list[IndexEntry]:
    """Reserve and commit keys that must all be absent and fit."""
    entries = index.reserve(keys, nbytes, owner=1)
    assert all(isinstance(entry, IndexEntry) for entry in entries)
    assert all(index.commit(entry, SUMS) for entry in entries)
    return entries


def present(index: Index) -> list[bytes]:
    return [key for key, there in zip(KEYS, index.contains(KEYS), strict=True) if there]


# ---- the life of an entry


def test_an_entry_is_readable_from_its_commit_on():
    index = make(4)
    (entry,) = index.reserve(KEYS[:1], SIZE, owner=7)
    assert (entry.key, entry.sums, entry.owner, entry.extent.nbytes) == (KEYS[0], None, 7, SIZE)
    assert index.pin_prefix(KEYS[:1]) == []
    assert index.contains(KEYS[:2]) == [False, False]
    assert index.commit(entry, SUMS)
    assert (entry.sums, entry.owner, entry.pins) == (SUMS, 0, 0)
    assert index.contains(KEYS[:2]) == [True, False]
    assert index.pin_prefix(KEYS[:1]) == [entry]
    assert index.check() == ""


def test_pins_the_longest_run_from_the_first_key_on():
    index = make(6)
    first, second = write(index, KEYS[:2])
    index.reserve(KEYS[2:3], SIZE, owner=1)
    write(index, KEYS[3:4])
    assert index.pin_prefix(KEYS[:4]) == [first, second]
    assert [entry.pins for entry in (first, second)] == [1, 1]
    assert index.pin_prefix(KEYS[2:4]) == []
    assert index.pin_prefix([]) == []
    assert index.stats().pinned_nbytes == 2 * SIZE
    index.unpin([first, second])
    assert index.stats().pinned_nbytes == 0


def test_a_touched_run_is_evicted_last_tail_before_head_and_ends_where_a_key_was_lost():
    index = make(4)
    first, second, third, _ = write(index, KEYS[:4])
    index.hold(KEYS[2])
    index.discard(KEYS[2:3])
    assert index.touch([first, second, third]) == 2
    evicted = []
    for key in KEYS[5:8]:
        before = present(index)
        write(index, [key])
        evicted += [gone for gone in before if gone not in present(index)]
    assert evicted == [KEYS[3], KEYS[1], KEYS[0]]
    index.unpin([third])


def test_unpinning_once_too_often_is_a_broken_invariant():
    index = make(2)
    write(index, KEYS[:1])
    pinned = index.pin_prefix(KEYS[:1])
    index.unpin(pinned)
    with pytest.raises(AssertionError, match="not pinned"):
        index.unpin(pinned)


@pytest.mark.parametrize("end", [lambda index, entry: index.commit(entry, SUMS), Index.abandon])
def test_ending_a_write_twice_is_a_broken_invariant(end):
    index = make(2)
    (entry,) = index.reserve(KEYS[:1], SIZE, owner=1)
    end(index, entry)
    for again in (index.abandon, index.revoke, lambda entry: index.commit(entry, SUMS)):
        with pytest.raises(AssertionError, match="not being written"):
            again(entry)
    assert index.check() == ""


def test_reserve_answers_each_key():
    index = make(4)
    write(index, KEYS[:1])
    index.reserve(KEYS[1:2], SIZE, owner=1)
    answer = index.reserve([KEYS[0], KEYS[2], KEYS[1], KEYS[2], KEYS[3]], SIZE, owner=2)
    assert [answer[0], answer[2], answer[3]] == [PRESENT, BUSY, BUSY]
    assert [answer[1].owner, answer[4].owner] == [2, 2]
    assert answer[1].extent != answer[4].extent


def test_an_abandoned_entry_gives_key_and_memory_back():
    index = make(1)
    (entry,) = index.reserve(KEYS[:1], SIZE, owner=1)
    index.abandon(entry)
    assert index.stats().writing_nbytes == 0
    write(index, KEYS[:1])


def test_a_revoked_entry_gives_its_key_back_at_once_and_its_memory_at_the_end():
    index = make(2)
    (revoked,) = index.reserve(KEYS[:1], SIZE, owner=1)
    index.revoke(revoked)
    index.revoke(revoked)
    assert index.stats().dead_nbytes == SIZE
    (again,) = index.reserve(KEYS[:1], SIZE, owner=2)
    assert again.extent != revoked.extent
    assert index.reserve(KEYS[1:2], SIZE, owner=2) == [NO_ROOM]
    assert not index.commit(revoked, SUMS)
    assert revoked.sums is None
    assert index.stats().dead_entries == 0
    assert index.commit(again, SUMS)
    assert index.check() == ""


def test_a_discarded_pinned_entry_keeps_its_memory_until_the_last_unpin():
    index = make(1)
    (entry,) = write(index, KEYS[:1])
    for _ in range(2):
        index.pin_prefix(KEYS[:1])
    assert index.discard(KEYS) == 1
    assert present(index) == []
    for pinned in (SIZE, SIZE):
        assert index.stats()[:6] == (0, 0, 1, 0, 0, SIZE)
        assert index.stats().pinned_nbytes == pinned
        assert index.reserve(KEYS[:1], SIZE, owner=1) == [NO_ROOM]
        index.unpin([entry])
    write(index, KEYS[:1])
    assert index.check() == ""


def test_discard_leaves_what_is_being_written():
    index = make(2)
    (entry,) = index.reserve(KEYS[:1], SIZE, owner=1)
    assert index.discard(KEYS[:2]) == 0
    assert index.commit(entry, SUMS)


def test_clear_takes_one_namespace_or_all():
    index = make(6)
    write(index, [KEYS[0], KEYS[1], KEYS[5]])
    index.pin_prefix(KEYS[:1])
    (writing,) = index.reserve([KEYS[2]], SIZE, owner=1)
    assert index.clear(NAMESPACES[0]) == 3
    assert present(index) == [KEYS[5]]
    assert index.stats().dead_entries == 2
    assert not index.commit(writing, SUMS)
    assert index.clear() == 1
    assert index.stats().committed_entries == 0
    assert index.check() == ""


# ---- eviction


def test_evicts_as_few_as_needed():
    index = make(4)
    write(index, KEYS[:3])
    write(index, KEYS[5:7])
    assert index.stats().evictions == 1
    assert len(present(index)) == 4


@pytest.mark.parametrize("policy", [fifo, lru, lfu])
@pytest.mark.parametrize("used", [False, True])
def test_a_prompts_tail_is_evicted_before_its_head(policy, used):
    """Although its head is committed first, as a chunked prefill does."""
    index = make(4, policy)
    for entry in index.reserve(KEYS[:4], SIZE, owner=1):
        index.commit(entry, SUMS)
    if used:
        index.unpin(index.pin_prefix(KEYS[:4]))
    for left in (3, 2, 1, 0):
        (entry,) = index.reserve(KEYS[5 + left : 6 + left], SIZE, owner=1)
        assert isinstance(entry, IndexEntry)
        assert present(index) == KEYS[:left]


def test_a_touched_prefix_outlives_an_untouched_one():
    index = make(4)
    write(index, KEYS[:2])
    write(index, KEYS[5:7])
    index.unpin(index.pin_prefix(KEYS[:2]))
    write(index, KEYS[7:8])
    assert present(index) == [*KEYS[:2], KEYS[5], KEYS[7]]
    write(index, KEYS[8:9])
    assert present(index) == [*KEYS[:2], *KEYS[7:9]]


def test_evicts_nothing_for_what_cannot_fit():
    index = make(4)
    write(index, KEYS[:3])
    held = index.pin_prefix(KEYS[:2])
    answer = index.reserve(KEYS[5:8], SIZE, owner=1)
    assert isinstance(answer[0], IndexEntry)
    assert answer[1:] == [NO_ROOM, NO_ROOM]
    assert present(index) == KEYS[:3]
    assert index.stats().evictions == 0
    index.abandon(answer[0])
    index.unpin(held)
    assert len(write(index, KEYS[5:8])) == 3


def test_more_than_the_allocator_can_ever_lend_evicts_nothing():
    index = make(4)
    write(index, KEYS[:4])
    assert index.reserve(KEYS[5:6], 4 * SIZE + 1, owner=1) == [NO_ROOM]
    assert present(index) == KEYS[:4]


def test_keys_named_in_the_call_are_not_evicted_by_it():
    index = make(3)
    write(index, KEYS[:3])
    answer = index.reserve([KEYS[2], KEYS[5], KEYS[2]], SIZE, owner=1)
    assert [answer[0], answer[2]] == [PRESENT, PRESENT]
    assert isinstance(answer[1], IndexEntry)
    assert present(index) == [KEYS[0], KEYS[2]]
    assert index.reserve([KEYS[0], KEYS[2], KEYS[6]], SIZE, owner=1) == [PRESENT, PRESENT, NO_ROOM]
    assert index.reserve([KEYS[6]], SIZE, owner=1) != [NO_ROOM]
    assert index.check() == ""


def test_pinned_entries_are_passed_over_until_none_is_left():
    index = make(4)
    for key in KEYS[:4]:
        write(index, [key])
    held = [*index.pin_prefix(KEYS[:1]), *index.pin_prefix(KEYS[2:3])]
    write(index, KEYS[5:6])
    assert present(index) == [KEYS[0], KEYS[2], KEYS[3], KEYS[5]]
    write(index, KEYS[6:7])
    assert present(index) == [KEYS[0], KEYS[2], KEYS[5], KEYS[6]]
    index.unpin(held)
    assert index.check() == ""


def test_goes_on_evicting_where_holes_are_too_small():
    index = Index(FreeList(8 * PAGE), lru())
    for key in KEYS[:8]:
        write(index, [key], PAGE)
    held = index.pin_prefix(KEYS[1:2])
    write(index, KEYS[8:9], 2 * PAGE)  # 0 leaves a hole of one page below the pinned 1; 2 and 3 make two
    assert present(index) == [KEYS[1], *KEYS[4:9]]
    assert index.stats().evictions == 3
    index.unpin(held)
    assert index.check() == ""


@pytest.mark.parametrize("policy", [fifo, lru, lfu, mru])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_mixed_sizes_add_up_and_evict_nothing_for_what_cannot_fit(policy, data):
    index = Index(FreeList(16 * PAGE), policy())
    for _ in range(data.draw(st.integers(1, 25))):
        keys = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
        nbytes = PAGE * data.draw(st.integers(1, 6))
        before, evictions = present(index), index.stats().evictions
        named = set(keys) & set(before)
        evictable = [index._entries[key].nbytes for key in set(before) - named if not index._entries[key].pins]
        room = index._allocator.free_nbytes + sum(evictable)
        cannot_fit = (len(set(keys)) - len(named)) * nbytes > room
        answer = index.reserve(keys, nbytes, owner=1)
        assert index.check() == ""
        if cannot_fit:
            assert index.stats().evictions == evictions
        assert named <= set(present(index))
        for entry in answer:
            if isinstance(entry, IndexEntry):
                index.commit(entry, SUMS)
        if data.draw(st.booleans()):
            index.pin_prefix(keys[:1])
        assert index.check() == ""


def owned_twice(index: Index, entry: IndexEntry) -> None:
    index._entries[KEYS[1]].offset = entry.offset


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda index, entry: setattr(entry, "key", KEYS[5]), "filed under a key that it has lost"),
        (lambda index, entry: setattr(entry, "sums", None), "both written and readable, or neither"),
        (lambda index, entry: setattr(entry, "owner", 7), "both written and readable, or neither"),
        (lambda index, entry: index._dead.add(IndexEntry(KEYS[6], entry.extent, 0)), "not held by one side"),
        (lambda index, entry: setattr(index, "_pinned_nbytes", 8), "pinned: entries have 0 bytes, the counter says 8"),
        (lambda index, entry: setattr(index, "_writing_entries", 1), "the count of entries being written is wrong"),
        (owned_twice, "overlap"),
    ],
)
def test_a_broken_index_says_what_is_wrong_with_it(spoil, says):
    index = make(4)
    entry, _ = write(index, KEYS[:2])
    assert index.check() == ""
    spoil(index, entry)
    assert says in index.check()


# ---- any sequence of calls, against the definition


@dataclass(eq=False)
class Model:
    entry: IndexEntry
    committed: bool = False
    pins: int = 0
    spared: int = 0


class IndexMachine(RuleBasedStateMachine):
    """One size, lru: then every answer, every victim and every number is determined."""

    @initialize(capacity=st.integers(1, 7))
    def start(self, capacity):
        self.capacity = capacity
        self.index = Index(FreeList(capacity * SIZE), lru())
        self.live: dict[bytes, Model] = {}  # the first is evicted first
        self.dead: list[Model] = []
        self.evictions = 0

    @rule(npages=st.integers(1, 2))
    def grow(self, npages):
        if self.capacity < 8:
            self.index._allocator.grow(npages * SIZE)
            self.capacity += npages

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5), owner=st.integers(1, 3))
    def reserve(self, keys, owner):
        absent = [key for key in dict.fromkeys(keys) if key not in self.live]
        room = self.capacity - len(self.live) - len(self.dead)
        free = [k for k, held in self.live.items() if held.committed and not held.pins and k not in keys]
        victims = [key for key in free if not self.live[key].spared]
        needed = len(absent) - room
        if 0 < needed <= len(free):
            if needed > len(victims):  # nothing is spared any more but what was named
                victims += [key for key in free if key not in victims]
                for key, held in self.live.items():
                    held.spared = held.spared if key in keys and not held.pins else 0
            for victim in victims[:needed]:
                del self.live[victim]
                self.evictions += 1
            room = len(absent)
        expected = {key: BUSY if not held.committed else PRESENT for key, held in self.live.items()}
        answer = self.index.reserve(keys, SIZE, owner)
        got: dict[bytes, IndexEntry] = {}
        for key, outcome in zip(keys, answer, strict=True):
            if key in expected:
                assert outcome is expected[key]
            elif key in absent[:room]:
                assert isinstance(outcome, IndexEntry)
                assert (outcome.key, outcome.owner) == (key, owner)
                got[key], expected[key] = outcome, BUSY
            else:
                assert outcome is NO_ROOM
        for key in reversed(absent[:room]):
            self.live[key] = Model(got[key])

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def pin_prefix(self, keys):
        run = []
        for key in keys:
            if key not in self.live or not self.live[key].committed:
                break
            run.append(key)
        assert self.index.pin_prefix(keys) == [self.live[key].entry for key in run]
        for key in reversed(run):
            held = self.live[key] = self.live.pop(key)
            held.pins += 1

    @rule(key=st.sampled_from(KEYS))
    def spare(self, key):
        there = key in self.live and self.live[key].committed
        assert self.index.spare(key) == there
        if there:
            self.live[key].spared += 1

    @rule(key=st.sampled_from(KEYS))
    def unspare(self, key):
        self.index.unspare(key)
        if key in self.live:
            self.live[key].spared = max(0, self.live[key].spared - 1)

    def pinned(self) -> list[Model]:
        return [held for held in [*self.live.values(), *self.dead] if held.pins]

    @precondition(lambda self: self.pinned())
    @rule(data=st.data())
    def unpin(self, data):
        held = data.draw(st.sampled_from(self.pinned()))
        held.pins -= 1
        self.index.unpin([held.entry])
        if held in self.dead and not held.pins:
            self.dead.remove(held)

    def written(self) -> list[Model]:
        return [held for held in [*self.live.values(), *self.dead] if not held.committed]

    @precondition(lambda self: self.written())
    @rule(data=st.data())
    def commit(self, data):
        held = data.draw(st.sampled_from(self.written()))
        assert self.index.commit(held.entry, SUMS) == (held not in self.dead)
        if held in self.dead:
            self.dead.remove(held)
        held.committed = True

    @precondition(lambda self: self.written())
    @rule(data=st.data())
    def abandon(self, data):
        held = data.draw(st.sampled_from(self.written()))
        self.index.abandon(held.entry)
        if held in self.dead:
            self.dead.remove(held)
        else:
            del self.live[held.entry.key]

    @precondition(lambda self: self.written())
    @rule(data=st.data())
    def revoke(self, data):
        held = data.draw(st.sampled_from(self.written()))
        self.index.revoke(held.entry)
        if held not in self.dead:
            self.kill(held.entry.key)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def discard(self, keys):
        gone = [key for key in dict.fromkeys(keys) if key in self.live and self.live[key].committed]
        assert self.index.discard(keys) == len(gone)
        for key in gone:
            self.kill(key)

    @rule(namespace=st.sampled_from([*NAMESPACES, None]))
    def clear(self, namespace):
        gone = [key for key in self.live if namespace is None or key.startswith(namespace)]
        assert self.index.clear(namespace) == len(gone)
        for key in gone:
            self.kill(key)

    def kill(self, key: bytes) -> None:
        held = self.live.pop(key)
        if held.pins or not held.committed:
            self.dead.append(held)

    @invariant()
    def adds_up(self):
        if not hasattr(self, "index"):
            return
        assert self.index.check() == ""
        assert self.index._allocator.check() == ""
        committed = [held for held in self.live.values() if held.committed]
        assert self.index.contains(KEYS) == [k in self.live and self.live[k].committed for k in KEYS]
        assert self.index.stats() == (
            len(committed),
            len(self.live) - len(committed),
            len(self.dead),
            len(committed) * SIZE,
            (len(self.live) - len(committed)) * SIZE,
            len(self.dead) * SIZE,
            len(self.pinned()) * SIZE,
            self.evictions,
        )
        assert all(held.entry.pins == held.pins for held in [*self.live.values(), *self.dead])
        assert self.index._dead == {held.entry for held in self.dead}


TestAnySequence = IndexMachine.TestCase
TestAnySequence.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
