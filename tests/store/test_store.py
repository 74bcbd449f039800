from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index, Outcome
from kvkeep.core.policies.queue import lru
from kvkeep.errors import WireError
from kvkeep.store.openings import MAX_RANGES, Opening
from kvkeep.store.sessions import Session, WriteLease
from kvkeep.store.store import Fetched, Reservation, Store
from kvkeep.testing.doubles.transfers import ManualClock

NBYTES = 8192
NAMESPACES = [b"a" * 16, b"b" * 16]
DIGESTS = [bytes([n]) * 32 for n in range(6)]
SUMS = [b"s%d" % n for n in range(6)]


def make(chunks: int = 8, max_pinned_share: float = 1.0) -> Store:
    pool_nbytes = chunks * NBYTES
    return Store(Index(FreeList(pool_nbytes), lru()), pool_nbytes, max_pinned_share)


def opened(store: Store, namespace: bytes = NAMESPACES[0], verify_every: int = 0, nbytes: int = NBYTES) -> Session:
    return store.open(Opening("engine", namespace, "{}", nbytes, holders=(), verify_every=verify_every))


def write(store: Store, session: Session, numbers: list[int]) -> list[int]:
    got = store.reserve(session, [DIGESTS[n] for n in numbers])
    assert not any(isinstance(one, Outcome) for one in got.offsets)
    done = store.commit(session, got.lease, range(len(numbers)), [SUMS[n] for n in numbers])
    assert all(done)
    store.release(session, got.lease)
    return got.offsets


def at_rest(store: Store) -> bool:
    assert store.index.check() == ""
    stats = store.index.stats()
    return stats.pinned_nbytes == stats.writing_nbytes == stats.dead_nbytes == 0


# ---- the life of a chunk


def test_what_was_committed_is_fetched_up_to_the_first_gap():
    store = make()
    session = opened(store)
    places = write(store, session, [0, 1, 3])
    got = store.fetch(session, DIGESTS)
    assert got.offsets == places[:2]
    assert session.pinned_nbytes == store.figures()["pinned_nbytes"] == 2 * NBYTES
    store.release(session, got.lease)
    assert at_rest(store)
    assert session.pinned_nbytes == 0


def test_a_miss_has_no_lease():
    store = make()
    session = opened(store)
    write(store, session, [1])
    assert store.fetch(session, DIGESTS) == Fetched(0, [], {})
    assert store.fetch(session, []) == Fetched(0, [], {})
    assert not session.leases


@pytest.mark.parametrize("nbytes", [NBYTES * 2, NBYTES // 2])
def test_a_chunk_of_another_size_under_the_same_key_is_a_miss(nbytes: int):
    store = make(16)
    write(store, opened(store), [0, 1])
    assert store.fetch(opened(store, nbytes=nbytes), DIGESTS) == Fetched(0, [], {})
    assert at_rest(store)


def test_reserved_chunks_are_no_hit_before_their_commit():
    store = make()
    one, other = opened(store), opened(store)
    got = store.reserve(one, DIGESTS[:2])
    assert store.fetch(one, DIGESTS[:2]).lease == 0
    assert store.reserve(other, DIGESTS[:2]) == Reservation(0, [Outcome.BUSY] * 2)
    assert store.commit(one, got.lease, [0], SUMS[:1]) == [True]
    assert store.reserve(other, DIGESTS[:3]).offsets[:2] == [Outcome.PRESENT, Outcome.BUSY]
    store.release(one, got.lease)
    assert isinstance(store.reserve(other, DIGESTS[1:2]).offsets[0], int), "what was given up is free for others"


def test_a_commit_counts_once_and_only_for_its_own_lease_and_place():
    store = make()
    one, other = opened(store), opened(store)
    got = store.reserve(one, DIGESTS[:2])
    assert store.commit(other, got.lease, [0, 1], SUMS[:2]) == [False, False]
    assert store.commit(one, got.lease, [0, 1], SUMS[:1]) == [False, False], "a sum is missing"
    assert store.commit(one, got.lease, [5, -1, 0], SUMS[:3]) == [False, False, True]
    assert store.commit(one, got.lease, [0], SUMS[:1]) == [False]
    store.release(one, got.lease)
    assert store.commit(one, got.lease, [1], SUMS[:1]) == [False], "the lease has ended"
    assert store.figures()["chunks"] == 1
    assert at_rest(store)


def test_a_read_lease_is_nothing_to_commit_to():
    store = make()
    session = opened(store)
    write(store, session, [0])
    read = store.fetch(session, DIGESTS[:1])
    assert store.commit(session, read.lease, [0], [b"other"]) == [False]
    assert store.fetch(opened(store, verify_every=1), DIGESTS[:1]).sums == {0: SUMS[0]}


@pytest.mark.parametrize("lease", [0, -1, 999, 2**63])
def test_an_invented_lease_changes_nothing(lease: int):
    store = make()
    session = opened(store)
    write(store, session, [0])
    read, wrote = store.fetch(session, DIGESTS[:1]), store.reserve(session, DIGESTS[1:2])
    before = store.figures()
    store.release(session, lease)
    assert store.commit(session, lease, [0], SUMS[:1]) == [False]
    other = opened(store)
    for leased in (read.lease, wrote.lease):
        store.release(other, leased)  # real, but another session's
    store.close(other)
    assert store.figures() == before
    assert set(session.leases) == {read.lease, wrote.lease}


def test_a_lease_is_released_once():
    store = make()
    session = opened(store)
    write(store, session, [0])
    first, second = store.fetch(session, DIGESTS[:1]), store.fetch(session, DIGESTS[:1])
    store.release(session, first.lease)
    store.release(session, first.lease)
    assert store.figures()["pinned_nbytes"] == session.pinned_nbytes == NBYTES
    store.release(session, second.lease)
    assert at_rest(store)


def test_a_cleared_chunk_in_the_making_cannot_be_committed():
    store = make()
    session = opened(store)
    got = store.reserve(session, DIGESTS[:1])
    assert store.clear(session, everything=False) == 1
    again = store.reserve(session, DIGESTS[:1])
    assert again.offsets[0] != got.offsets[0], "memory that may still be written to was lent again"
    assert store.commit(session, got.lease, [0], SUMS[:1]) == [False]
    assert store.commit(session, again.lease, [0], SUMS[:1]) == [True]


def test_a_discarded_chunk_keeps_its_memory_while_it_is_read():
    store = make(chunks=1)
    session = opened(store)
    write(store, session, [0])
    got = store.fetch(session, DIGESTS[:1])
    assert store.discard(session, DIGESTS) == 1
    assert store.fetch(session, DIGESTS[:1]).lease == 0
    assert store.reserve(session, DIGESTS[:1]) == Reservation(0, [Outcome.NO_ROOM])
    store.release(session, got.lease)
    assert store.reserve(session, DIGESTS[:1]).offsets == got.offsets


def test_a_store_that_stopped_lending_still_serves():
    store = make()
    session = opened(store)
    places = write(store, session, [0])
    store.lending = False
    assert store.reserve(session, DIGESTS[1:3]) == Reservation(0, [Outcome.NO_ROOM] * 2)
    assert store.fetch(session, DIGESTS).offsets == places


# ---- writers that show no sign of life


def slow_writers(lease_time_s: float = 60.0) -> tuple[Store, ManualClock]:
    clock = ManualClock()
    pool_nbytes = 8 * NBYTES
    return Store(Index(FreeList(pool_nbytes), lru()), pool_nbytes, 1.0, lease_time_s, clock), clock


def test_an_overdue_writer_loses_its_key_but_not_its_memory_and_another_takes_over():
    store, clock = slow_writers()
    slow, other = opened(store), opened(store)
    held = store.reserve(slow, DIGESTS[:2])
    assert store.commit(slow, held.lease, [0], SUMS[:1]) == [True]
    clock.advance(59.9)
    assert store.reserve(other, DIGESTS[:2]).offsets == [Outcome.PRESENT, Outcome.BUSY]
    clock.advance(0.2)
    taken = store.reserve(other, DIGESTS[:2])
    assert taken.offsets[0] is Outcome.PRESENT, "what was committed stays readable to others"
    assert taken.offsets[1] not in held.offsets
    assert store.figures()["dead_nbytes"] == NBYTES, "the first writer may still be at its memory"
    assert store.figures()["revoked"] == 1
    assert store.commit(slow, held.lease, [1], [b"late"]) == [False]
    assert store.commit(other, taken.lease, [1], SUMS[1:2]) == [True]
    store.release(slow, held.lease)
    store.release(other, taken.lease)
    assert store.fetch(other, DIGESTS[:2]).sums == {}
    assert [entry.sums for entry in store.pin(other, store.keys(other, DIGESTS[:2]))] == SUMS[:2]


def test_age_alone_frees_nothing_and_costs_a_lonely_writer_nothing():
    store, clock = slow_writers()
    session = opened(store)
    held = store.reserve(session, DIGESTS[:2])
    clock.advance(10_000.0)
    assert isinstance(store.reserve(session, DIGESTS[2:3]).offsets[0], int)
    assert store.figures()["dead_nbytes"] == 0
    assert store.commit(session, held.lease, [0, 1], SUMS[:2]) == [True, True]


def test_a_writer_whose_other_chunks_come_is_at_work():
    store, clock = slow_writers()
    slow, other = opened(store), opened(store)
    held = store.reserve(slow, DIGESTS[:3])
    for place in range(2):
        clock.advance(40.0)
        assert store.commit(slow, held.lease, [place], SUMS[place : place + 1]) == [True]
    clock.advance(40.0)
    assert store.reserve(other, DIGESTS[2:3]).offsets == [Outcome.BUSY]


# ---- bounds


@pytest.mark.parametrize(("share", "runs"), [(1.0, [4, 0]), (0.5, [2, 0]), (0.74, [2, 0]), (0.2, [0, 0])])
def test_waiting_requests_of_one_session_pin_no_more_than_their_share(share: float, runs: list[int]):
    store = make(chunks=4, max_pinned_share=share)
    session = opened(store)
    write(store, session, [0, 1, 2, 3])
    got = [store.fetch(session, DIGESTS[:4]) for _ in range(2)]
    assert [len(one.offsets) for one in got] == runs
    assert store.figures()["pinned_nbytes"] <= share * store.pool_nbytes
    other = opened(store)
    assert len(store.fetch(other, DIGESTS[:4]).offsets) == runs[0], "the share is each session's own"
    store.release(session, got[0].lease)
    assert len(store.fetch(session, DIGESTS[:4]).offsets) == runs[0]


def test_the_share_counts_what_chunks_take():
    store = make(chunks=4, max_pinned_share=0.5)
    session = opened(store, nbytes=NBYTES // 2 + 1)  # an extent takes NBYTES
    got = store.reserve(session, DIGESTS[:4])
    store.commit(session, got.lease, range(4), SUMS[:4])
    store.fetch(session, DIGESTS[:4])
    assert session.pinned_nbytes <= 0.5 * store.pool_nbytes


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_sums_come_for_every_nth_fetched_chunk(every: int):
    store = make()
    writer, reader = opened(store), opened(store, verify_every=every)
    write(store, writer, [0, 1, 2, 3])
    seen = []
    for count in (1, 4, 2, 3, 4):
        got = store.fetch(reader, DIGESTS[:count])
        assert all(sum_ == SUMS[place] for place, sum_ in got.sums.items())
        seen += [place in got.sums for place in range(count)]
        store.release(reader, got.lease)
    assert seen == [n % every == 0 for n in range(14)]


# ---- sessions


@pytest.mark.parametrize(("namespace", "nbytes", "every"), [(b"", 1, 0), (b"x" * 17, 1, 0), (b"x" * 16, 0, 0)])
def test_an_opening_that_cannot_be_right_is_refused(namespace: bytes, nbytes: int, every: int):
    store = make()
    with pytest.raises(WireError):
        opened(store, namespace, every, nbytes)
    assert not store.sessions


def test_a_negative_verify_every_is_refused():
    with pytest.raises(WireError, match="verify_every"):
        opened(make(), verify_every=-1)


def test_two_namespaces_never_meet():
    store = make()
    one, other = (opened(store, namespace) for namespace in NAMESPACES)
    write(store, one, [0, 1])
    assert store.fetch(other, DIGESTS[:1]).lease == 0
    assert store.discard(other, DIGESTS) == 0
    assert store.clear(other, everything=False) == 0
    theirs = store.reserve(other, DIGESTS[:1])
    assert theirs.lease, "a key in the making of another namespace is not in the way"
    assert store.commit(other, theirs.lease, [0], [b"other"]) == [True]
    assert store.fetch(one, DIGESTS[:1]).offsets != theirs.offsets
    assert store.clear(one, everything=False) == 2
    assert store.fetch(other, DIGESTS[:1]).offsets == theirs.offsets
    assert store.clear(one, everything=True) == 1


def test_a_renamed_session_works_in_its_new_namespace_only():
    store = make()
    session = opened(store)
    write(store, session, [0])
    making = store.reserve(session, DIGESTS[1:2])
    with pytest.raises(WireError, match="16 bytes"):
        store.rename(session, b"short")
    assert session.namespace == NAMESPACES[0]
    store.rename(session, NAMESPACES[1])
    assert store.fetch(session, DIGESTS[:1]).lease == 0
    assert store.commit(session, making.lease, [0], SUMS[1:2]) == [True], "a lease outlives the name"
    assert store.fetch(session, DIGESTS[1:2]).lease == 0, "but under the name that it was reserved with"
    assert len(store.fetch(opened(store), DIGESTS).offsets) == 2


@pytest.mark.parametrize("leaves", ["renamed", "ended"])
@pytest.mark.parametrize("lasting", [True, False])
def test_what_nobody_can_find_again_goes_with_the_last_session_of_its_namespace(leaves: str, lasting: bool) -> None:
    store = make()
    session, other, beside = opened(store), opened(store), opened(store, NAMESPACES[1])
    own = b"o" * 16
    write(store, beside, [0])
    store.rename(session, own, lasting)
    store.rename(other, own, lasting)
    store.namespaces.name(own, "engine", "")
    write(store, session, [0, 1])
    making = store.reserve(session, DIGESTS[2:3])
    held = store.fetch(session, DIGESTS[:1]).lease

    def leave(one: Session) -> None:
        if leaves == "renamed":
            store.rename(one, NAMESPACES[0], lasting)
        else:
            store.close(one)

    leave(other)
    assert store.figures()["chunks"] == 3, "the first session is still there"
    leave(session)
    assert store.figures()["chunks"] == (3 if lasting else 1)
    assert (own in store.namespaces.known) == lasting
    if leaves == "renamed":
        assert store.commit(session, making.lease, [0], SUMS[2:3]) == [lasting]
        store.release(session, held)
        store.close(session)
    assert at_rest(store)
    assert len(store.fetch(beside, DIGESTS[:1]).offsets) == 1


def test_the_end_of_a_session_gives_everything_back():
    store = make()
    session = opened(store)
    write(store, session, [0])
    store.fetch(session, DIGESTS[:1])
    store.reserve(session, DIGESTS[1:3])
    store.close(session)
    assert at_rest(store)
    assert store.figures()["chunks"] == 1
    assert store.figures()["sessions"] == 0
    store.close(session)
    assert at_rest(store)


def test_a_lingering_session_keeps_its_memory_but_not_its_keys():
    store = make(chunks=4)
    session, other = opened(store), opened(store)
    write(store, session, [0])
    read = store.fetch(session, DIGESTS[:1])
    making = store.reserve(session, DIGESTS[1:3])
    store.linger(session)
    figures = store.figures()
    assert figures["quarantined_nbytes"] == 3 * NBYTES
    assert figures["sessions"] == 1
    assert store.fetch(other, DIGESTS[:2]).offsets == read.offsets, "what is committed is still served"
    got = store.reserve(other, DIGESTS[1:3])
    assert isinstance(got.offsets[0], int), "its keys in the making are free for others"
    assert got.offsets[1] is Outcome.NO_ROOM
    assert got.offsets[0] not in making.offsets, "but not their memory"
    store.close(session)
    assert store.figures()["quarantined_nbytes"] == 0
    assert store.reserve(other, DIGESTS[2:3]).lease
    store.close(other)
    assert at_rest(store)


# ---- anything, in any order


class Sessions(RuleBasedStateMachine):
    """A few sessions on a small pool against a model: what a key's chunk is, and what every lease holds."""

    @initialize(share=st.sampled_from((0.5, 1.0)))
    def start(self, share: float) -> None:
        self.store = make(chunks=4, max_pinned_share=share)
        self.share = share
        self.open: list[Session] = []
        self.away: list[Session] = []
        self.content: dict[int, tuple[bytes, bytes]] = {}  # offset -> (namespace, digest) it was committed for

    @rule(namespace=st.sampled_from(NAMESPACES))
    def opens(self, namespace: bytes) -> None:
        if len(self.open) < 3:
            self.open.append(opened(self.store, namespace, verify_every=1))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), first=st.integers(0, 5), count=st.integers(1, 4))
    def fetch(self, data: st.DataObject, first: int, count: int) -> None:
        session = data.draw(st.sampled_from(self.open))
        digests = DIGESTS[first : first + count]
        got = self.store.fetch(session, digests)
        assert bool(got.lease) == bool(got.offsets)
        for place, offset in enumerate(got.offsets):
            assert self.content[offset] == (session.namespace, digests[place])
            assert got.sums[place] == session.namespace + digests[place]

    @precondition(lambda self: self.open)
    @rule(data=st.data(), numbers=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def reserve(self, data: st.DataObject, numbers: list[int]) -> None:
        session = data.draw(st.sampled_from(self.open))
        held = {
            entry.offset
            for one in [*self.open, *self.away]
            for lease in one.leases.values()
            for entry in (lease.entries.values() if isinstance(lease, WriteLease) else lease.entries)
        }
        got = self.store.reserve(session, [DIGESTS[n] for n in numbers])
        offsets = [one for one in got.offsets if isinstance(one, int)]
        assert not held & set(offsets), "memory under a lease was lent again"
        assert len(set(offsets)) == len(offsets)
        for offset in offsets:
            self.content.pop(offset, None)

    @precondition(lambda self: any(one.leases for one in self.open))
    @rule(data=st.data(), places=st.lists(st.integers(0, 3), max_size=3))
    def commit(self, data: st.DataObject, places: list[int]) -> None:
        session = data.draw(st.sampled_from([one for one in self.open if one.leases]))
        lease = data.draw(st.sampled_from(sorted(session.leases)))
        held = session.leases[lease]
        entries = dict(held.entries) if isinstance(held, WriteLease) else {}
        sums = [entries[place].key if place in entries else b"" for place in places]
        for place, done in zip(places, self.store.commit(session, lease, places, sums), strict=True):
            if done:
                entry = entries[place]
                self.content[entry.offset] = (entry.key[:16], entry.key[16:])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), invented=st.integers(0, 60))
    def release(self, data: st.DataObject, invented: int) -> None:
        session = data.draw(st.sampled_from(self.open))
        self.store.release(session, data.draw(st.sampled_from([*sorted(session.leases), invented])))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), everything=st.booleans())
    def clear(self, data: st.DataObject, everything: bool) -> None:
        self.store.clear(data.draw(st.sampled_from(self.open)), everything)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=st.integers(0, 5))
    def discard(self, data: st.DataObject, number: int) -> None:
        self.store.discard(data.draw(st.sampled_from(self.open)), [DIGESTS[number]])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), namespace=st.sampled_from(NAMESPACES))
    def rename(self, data: st.DataObject, namespace: bytes) -> None:
        self.store.rename(data.draw(st.sampled_from(self.open)), namespace)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), dead=st.booleans())
    def ends(self, data: st.DataObject, dead: bool) -> None:
        session = data.draw(st.sampled_from(self.open))
        self.open.remove(session)
        if dead:
            self.store.close(session)
        else:
            self.store.linger(session)
            self.away.append(session)

    @precondition(lambda self: self.away)
    @rule()
    def dies(self) -> None:
        self.store.close(self.away.pop())

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.index.check() == ""
        figures = self.store.figures()
        assert figures["used_nbytes"] <= self.store.pool_nbytes
        assert figures["quarantined_nbytes"] == sum(one.held_nbytes for one in self.away)
        for one in [*self.open, *self.away]:
            writing = [lease.nbytes for lease in one.leases.values() if isinstance(lease, WriteLease)]
            assert one.reserved_nbytes == sum(writing)
        assert all(one.pinned_nbytes <= self.share * self.store.pool_nbytes for one in self.open)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for session in [*self.open, *self.away]:
                self.store.close(session)
            assert at_rest(self.store)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def sized(ranges: int, count: int, verify_every: int = 1) -> tuple[Store, Session]:
    """A store with room for `count` chunks of so many ranges, and a session that says their sizes."""
    sizes = (4096,) * ranges
    store = Store(Index(FreeList(count * sum(sizes)), lru()), count * sum(sizes), 1.0)
    return store, store.open(
        Opening("test", NAMESPACES[0], "", sum(sizes), holders=(), verify_every=verify_every, sizes=sizes)
    )


def test_one_answer_carries_no_more_sums_than_a_frame_takes() -> None:
    store, session = sized(MAX_RANGES, 8)
    lease = store.reserve(session, DIGESTS).lease
    assert all(store.commit(session, lease, range(6), [bytes(16 * MAX_RANGES)] * 6))
    fetched = store.fetch(session, DIGESTS)
    assert len(fetched.offsets) == 4
    assert sum(map(len, fetched.sums.values())) <= 2 << 20


def test_nor_does_it_where_nobody_said_how_many_sums_there_are() -> None:
    store = make(40)
    session = opened(store, verify_every=1)
    digests = [bytes([n]) * 32 for n in range(40)]
    lease = store.reserve(session, digests).lease
    assert all(store.commit(session, lease, range(40), [bytes(64 << 10)] * 40))
    fetched = store.fetch(session, digests)
    assert len(fetched.offsets) == 32
    assert sum(map(len, fetched.sums.values())) <= 2 << 20


@pytest.mark.parametrize("ranges", [(MAX_RANGES + 1, 1), (1, MAX_RANGES + 1)], ids=["chunk", "state"])
def test_a_chunk_of_more_ranges_than_an_answer_could_carry_is_refused(ranges: tuple[int, int]) -> None:
    store, (of_chunk, of_state) = make(), ranges
    with pytest.raises(WireError, match="32769 ranges is over the bound of 32768"):
        store.open(
            Opening(
                "test",
                NAMESPACES[0],
                "",
                4096 * of_chunk,
                holders=(),
                verify_every=0,
                sizes=(4096,) * of_chunk,
                state_sizes=(4096,) * of_state,
            )
        )
    assert not store.sessions


@pytest.mark.parametrize("sums", [b"", bytes(31), bytes(33), bytes(1 << 20)], ids=len)
def test_sums_that_are_not_one_a_range_are_refused_before_anything_is_committed(sums: bytes) -> None:
    store, session = sized(2, 8)
    lease = store.reserve(session, DIGESTS[:2]).lease
    with pytest.raises(WireError, match="bytes of sums for 2 ranges"):
        store.commit(session, lease, [0, 1], [bytes(32), sums])
    assert store.figures()["chunks"] == 0
    assert store.commit(session, lease, [0, 1], [bytes(32)] * 2) == [True, True]


def test_a_states_sums_are_one_for_each_of_its_own_ranges() -> None:
    store = make()
    session = store.open(
        Opening("test", NAMESPACES[0], "", NBYTES, holders=(), verify_every=1, sizes=(4096, 4096), state_sizes=(4096,))
    )
    assert session.states is not None
    lease = store.reserve(session.states, DIGESTS[:1]).lease
    with pytest.raises(WireError, match="32 bytes of sums for 1 ranges"):
        store.commit(session.states, lease, [0], [bytes(32)])
    assert store.commit(session.states, lease, [0], [bytes(16)]) == [True]


def test_sums_of_unknown_ranges_have_a_bound() -> None:
    store = make()
    session = opened(store)
    lease = store.reserve(session, DIGESTS[:2]).lease
    with pytest.raises(WireError, match="65537 bytes of sums"):
        store.commit(session, lease, [0, 1], [b"", bytes((64 << 10) + 1)])
    assert store.figures()["chunks"] == 0


def test_who_says_how_many_ranges_there_are_never_gets_sums_of_another_number() -> None:
    """Else somebody who does not say it could make the others' answers longer than a frame."""
    store, session = sized(2, 8)
    plain = opened(store)
    lease = store.reserve(plain, DIGESTS[:2]).lease
    assert store.commit(plain, lease, [0, 1], [bytes(32), bytes(64 << 10)]) == [True, True]
    assert len(store.fetch(session, DIGESTS[:2]).offsets) == 1
    assert len(store.fetch(plain, DIGESTS[:2]).offsets) == 2


# ---- who may reserve how much


def joined(store: Store, owner: int, namespace: bytes = NAMESPACES[0], **more: tuple[int, ...]) -> Session:
    session = silent(store, owner, namespace, **more)
    store.fetch(session, DIGESTS[:1])
    return session


def silent(store: Store, owner: int, namespace: bytes = NAMESPACES[0], **more: tuple[int, ...]) -> Session:
    """Joins and asks for no chunk, as `kvkeep stats` does."""
    return store.open(Opening("engine", namespace, "", NBYTES, holders=(1,), owner=owner, **more))


def room_for(store: Store, session: Session, numbers: range) -> int:
    """How many of these chunks the session gets room for."""
    return sum(isinstance(one, int) for one in store.reserve(session, [bytes([n]) * 32 for n in numbers]).offsets)


def test_beside_another_client_a_client_reserves_no_more_than_its_share() -> None:
    store = make(max_pinned_share=0.5)
    hog = joined(store, 1)
    assert room_for(store, hog, range(3)) == 3
    other = joined(store, 2)
    got = store.reserve(hog, [bytes([n]) * 32 for n in range(2, 6)])
    assert [isinstance(one, int) for one in got.offsets] == [False, True, False, False]
    assert [got.offsets[0], *got.offsets[2:]] == [Outcome.BUSY, Outcome.NO_ROOM, Outcome.NO_ROOM]
    assert room_for(store, hog, range(10, 12)) == 0
    assert room_for(store, other, range(20, 28)) == 4, "the others have their share"
    store.close(other)
    assert room_for(store, hog, range(10, 18)) == 4, "alone it may use all that is free"


def test_the_sessions_of_one_process_pin_no_more_than_one_share_together() -> None:
    store = make(8, max_pinned_share=0.5)
    first = silent(store, owner=7)
    write(store, first, [0, 1, 2, 3])
    held = store.fetch(first, DIGESTS[:3])
    assert len(held.offsets) == 3
    second, other = silent(store, owner=7), silent(store, owner=8)
    assert len(store.fetch(second, DIGESTS[:4]).offsets) == 1
    assert len(store.fetch(other, DIGESTS[:4]).offsets) == 4
    store.linger(first)
    assert store.fetch(second, DIGESTS[:1]).offsets == [], "what its ended session holds is in its share"
    store.close(first)
    assert len(store.fetch(second, DIGESTS[:4]).offsets) == 3


def test_whoever_asks_for_no_chunk_takes_no_share() -> None:
    store = make(max_pinned_share=0.5)
    engine, looks_on = joined(store, 1), silent(store, 2)
    assert room_for(store, engine, range(6)) == 6
    assert room_for(store, looks_on, range(10, 12)) == 2
    assert room_for(store, engine, range(20, 22)) == 0, "now there are two"


def test_what_is_committed_or_given_up_is_not_in_the_share() -> None:
    store = make(max_pinned_share=0.5)
    session, _ = joined(store, 1), joined(store, 2)
    got = store.reserve(session, DIGESTS[:4])
    assert store.commit(session, got.lease, [0], SUMS[:1]) == [True]
    assert room_for(store, session, range(10, 14)) == 1
    store.release(session, got.lease)
    assert room_for(store, session, range(20, 24)) == 3


def test_a_cleared_chunk_stays_in_its_writers_share_until_its_memory_is_back() -> None:
    store = make(max_pinned_share=0.5)
    session, _ = joined(store, 1), joined(store, 2)
    got = store.reserve(session, DIGESTS[:4])
    store.clear(session, everything=False)
    assert room_for(store, session, range(10, 14)) == 0
    assert store.commit(session, got.lease, range(4), SUMS[:4]) == [False] * 4
    assert room_for(store, session, range(10, 14)) == 4


@pytest.mark.parametrize("owner", [7, 0], ids=["one process", "nobody knows"])
def test_a_process_has_one_share_however_often_it_comes_back(owner: int) -> None:
    store = make(max_pinned_share=0.5)
    joined(store, 2)
    first, second = joined(store, owner), joined(store, owner)
    assert room_for(store, first, range(2)) == 2
    assert room_for(store, second, range(10, 18)) == (2 if owner else 4)
    store.linger(first)
    again = joined(store, owner)
    assert room_for(store, again, range(20, 28)) == (0 if owner else 2)
    store.close(first)
    store.close(second)
    assert room_for(store, again, range(30, 38)) == (4 if owner else 2)
    assert store.figures()["quarantined_nbytes"] == 0


def test_states_are_in_the_share() -> None:
    store = make(max_pinned_share=0.5)
    session, _ = joined(store, 1, sizes=(4096, 4096), state_sizes=(4096, 4096)), joined(store, 2)
    assert session.states is not None
    assert room_for(store, session.states, range(3)) == 3
    assert room_for(store, session, range(10, 14)) == 1


def test_who_only_looks_takes_no_share_from_others() -> None:
    store = make(max_pinned_share=0.5)
    opened(store)  # names no process: it can hold nothing beyond its connection
    assert room_for(store, joined(store, 1), range(8)) == 8
