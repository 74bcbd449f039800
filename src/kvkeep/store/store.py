"""The store: one pool, one index, the sessions that use them. One thread owns all of it, so nothing is locked.

Every call returns at once: a chunk that is not here is a miss, a pool that is full is a value. Knows nothing about
sockets, messages or the bytes in the pool; the planners' workers move those.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvkeep.core.index import Index, IndexEntry, Outcome
from kvkeep.core.layout import padded_nbytes
from kvkeep.core.units import NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.errors import WireError
from kvkeep.store.lent import Early
from kvkeep.store.namespaces import Namespaces, plain_identity, plain_name
from kvkeep.store.sessions import Opening, ReadLease, Session, WriteLease

MAX_SUMS_NBYTES = 2 << 20  # of one answer: a frame has a bound
MAX_RANGES = 32 << 10  # of a chunk, or of a state: a record holds more, and four chunks' sums fit an answer
MAX_UNSIZED_SUMS_NBYTES = 64 << 10  # of a chunk of which nobody said how many ranges it has


class Fetched(NamedTuple):
    """A run of pinned chunks: its lease (0: none), each chunk's offset in the pool, sums to verify by place."""

    lease: int
    offsets: list[int]
    sums: dict[int, bytes]


class Reservation(NamedTuple):
    """A write lease (0: none) and, for each digest, an offset in the pool or why there is none."""

    lease: int
    places: list[int | Outcome]


@dataclass
class Store:
    """`pool_nbytes` of memory under `index`; waiting requests of one session may pin `max_pinned_share` of it.

    A client may have as much of it reserved, or held by what is left of its ended sessions, while another is there.
    A chunk that is asked for while another lease has been writing it for more than `lease_time_s` changes its writer;
    the memory of the first one stays where it is until that lease ends. Those in `late` change theirs at once: a tier
    that hangs reads them.
    """

    index: Index
    pool_nbytes: int
    max_pinned_share: float = 0.5
    lease_time_s: float = 60.0
    clock: Callable[[], float] = time.monotonic
    sessions: dict[int, Session] = field(default_factory=dict)
    lingering: dict[int, Session] = field(default_factory=dict)
    lending: bool = True
    revoked: int = 0
    late: set[IndexEntry] = field(default_factory=set)
    namespaces: Namespaces = field(default_factory=Namespaces)
    _last: int = 0
    _writing: dict[int, WriteLease] = field(default_factory=dict)
    _quarantined: Counter[int] = field(default_factory=Counter)  # bytes of lingering sessions, by client

    def open(self, opening: Opening) -> Session:
        """A new session; WireError if what it says of itself cannot be right."""
        _check(opening)
        opening = replace(opening, name=plain_name(opening.name), identity=plain_identity(opening.identity))
        number = self.next_lease()
        session = Session(number, opening, opening.namespace, opening.owner or -number)
        if opening.state_sizes:
            of_states = opening_of_states(opening)
            session.states = Session(self.next_lease(), of_states, states_of(opening.namespace), session.client)
        self.sessions[session.number] = session
        return session

    def fetch(self, session: Session, digests: Sequence[bytes]) -> Fetched:
        """Pins the longest run of chunks in the pool from the first digest on, within the session's share of it."""
        session.asked = True
        return self.lend(session, self.pin(session, self.keys(session, digests[: self.room(session)])))

    def taken(self, session: Session) -> int:
        """What a chunk of this session takes in the pool (bytes)."""
        return padded_nbytes(session.opening.chunk_nbytes)

    def shape(self, session: Session) -> tuple[int, int]:
        """What a readable chunk of this session takes in the pool, and its sums (0: any); see `is_shaped`."""
        return self.taken(session), session.opening.sums_nbytes

    def room(self, session: Session) -> int:
        """How many chunks more the session may pin, and of how many one answer can carry the sums to verify."""
        pinned_nbytes = session.pinned_nbytes + session.promised_nbytes
        room = max(0, (int(self.pool_nbytes * self.max_pinned_share) - pinned_nbytes) // self.taken(session))
        every, sums_nbytes = session.opening.verify_every, session.opening.sums_nbytes or MAX_UNSIZED_SUMS_NBYTES
        return min(room, every * (MAX_SUMS_NBYTES // sums_nbytes)) if every else room

    def reservable_nbytes(self, session: Session) -> int:
        """What its client may reserve more: of its share while another client is there, else of the whole pool."""
        others = (one for one in self.sessions.values() if one.client != session.client and one.opening.holders)
        if not any(side.asked for one in others for side in one.sides):  # who only looks on, as `kvkeep stats`, is none
            return self.pool_nbytes
        own = [side for one in self.sessions.values() if one.client == session.client for side in one.sides]
        held_nbytes = self._quarantined[session.client] + sum(side.reserved_nbytes for side in own)
        return max(0, int(self.pool_nbytes * self.max_pinned_share) - held_nbytes)

    def pin(self, session: Session, keys: Sequence[bytes]) -> list[IndexEntry]:
        """Pins the longest run of present chunks that are of the session's shape."""
        nbytes, sums_nbytes = self.shape(session)
        entries = self.index.pin_prefix(keys)
        for count, entry in enumerate(entries):
            if entry.nbytes != nbytes or (sums_nbytes and len(entry.sums or b"") != sums_nbytes):
                self.index.unpin(entries[count:])
                return entries[:count]
        return entries

    def lend(self, session: Session, entries: list[IndexEntry], early: Sequence[Early] = ()) -> Fetched:
        """A lease on chunks; all are pinned, but for those that are lent `early`."""
        if not entries:
            return Fetched(0, [], {})
        coming = {one.entry for one in early}
        lease = self.next_lease()
        held = session.leases[lease] = ReadLease([entry for entry in entries if entry not in coming], early)
        session.pinned_nbytes += held.nbytes
        for one in early:
            one.leases += 1
        return Fetched(lease, [entry.offset for entry in entries], self._sampled(session, entries))

    def reserve(self, session: Session, digests: Sequence[bytes]) -> Reservation:
        """Room for the chunks that are absent, within its client's share; what cannot fit evicts nothing."""
        if not self.lending:
            return Reservation(0, [Outcome.NO_ROOM] * len(digests))
        session.asked = True
        lease = self.next_lease()
        keys = self.keys(session, digests)
        self.revoke_overdue(keys)
        most = self.reservable_nbytes(session) // self.taken(session)
        got = self.index.reserve(keys, session.opening.chunk_nbytes, lease, most)
        entries = {place: one for place, one in enumerate(got) if isinstance(one, IndexEntry)}
        if entries:
            held = session.leases[lease] = self._writing[lease] = WriteLease(entries, self.clock())
            session.reserved_nbytes += held.nbytes
        places = [one.offset if isinstance(one, IndexEntry) else one for one in got]
        return Reservation(lease if entries else 0, places)

    def revoke_overdue(self, keys: Sequence[bytes]) -> None:
        """Takes those of `keys` from their writers that are late, or showed no sign of life for `lease_time_s`."""
        if not self._writing and not self.late:
            return
        since_s = self.clock() - self.lease_time_s
        for entry in self.index.writing(keys):
            lease = self._writing.get(entry.owner)
            if entry in self.late or (lease is not None and lease.alive_s <= since_s):
                self.index.revoke(entry)
                self.revoked += 1

    def written(self, session: Session, lease: int, places: Sequence[int]) -> list[IndexEntry | None]:
        """The entries that a commit of these places is about; None for what is not this lease's."""
        held = session.leases.get(lease)
        return [held.entries.get(place) if isinstance(held, WriteLease) else None for place in places]

    def commit(self, session: Session, lease: int, places: Sequence[int], sums: Sequence[bytes]) -> list[bool]:
        """Makes reserved chunks readable; False where the chunk was cleared meanwhile or is not this lease's.

        WireError, and nothing is committed, if a chunk's sums are not one for each of its ranges.
        """
        held = session.leases.get(lease)
        if not isinstance(held, WriteLease) or len(places) != len(sums):
            return [False] * len(places)
        _check_sums(session.opening, sums)
        held.alive_s = self.clock()
        done = []
        for place, sum_ in zip(places, sums, strict=True):
            entry = held.entries.pop(place, None)
            session.reserved_nbytes -= entry.nbytes if entry is not None else 0
            done.append(entry is not None and self.index.commit(entry, sum_))
        return done

    def release(self, session: Session, lease: int) -> None:
        """Ends a lease; one that is unknown (ended already, or invented) changes nothing."""
        held = session.leases.pop(lease, None)
        self._writing.pop(lease, None)
        if isinstance(held, ReadLease):
            session.pinned_nbytes -= held.nbytes
            self.index.unpin(held.entries)
            for early in held.early:
                early.release(self.index)
        elif held is not None:
            session.reserved_nbytes -= held.nbytes
            for entry in held.entries.values():
                self.index.abandon(entry)

    def keys(self, session: Session, digests: Sequence[bytes]) -> list[bytes]:
        """The keys of a session's digests; the lengths of both were checked when they came."""
        namespace = session.namespace
        return [namespace + digest for digest in digests]

    def next_lease(self) -> int:
        """A number that no lease and no session has had."""
        self._last += 1
        return self._last

    def discard(self, session: Session, digests: Sequence[bytes]) -> int:
        """Takes chunks out of the index; their memory comes back with the last lease on them."""
        return sum(self.index.discard(self.keys(side, digests)) for side in session.sides)

    def clear(self, session: Session, everything: bool) -> int:
        """Drops the session's namespaces, or everything."""
        return sum(self.index.clear(one) for one in self.namespaces_of(session, everything))

    def namespaces_of(self, session: Session, everything: bool = False) -> list[bytes | None]:
        """What to clear for a session: its namespaces, or (None) everything."""
        return [None] if everything else [side.namespace for side in session.sides]

    def rename(self, session: Session, namespace: bytes, lasting: bool = True) -> None:
        """From here on the session's keys are in `namespace`; WireError if it is none. See `Session` for `lasting`."""
        check_namespace(namespace)
        left = [side.namespace for side in session.sides if not side.lasting]
        session.namespace, session.lasting = namespace, lasting
        if session.states is not None:
            session.states.namespace, session.states.lasting = states_of(namespace), lasting
        self._leave(left)

    def close(self, session: Session) -> None:
        """The session ended and none of its processes touches its memory: everything comes back."""
        self.sessions.pop(session.number, None)
        if self.lingering.pop(session.number, None) is not None:
            self._quarantine(session, -session.held_nbytes)
        for side in session.sides:
            for lease in list(side.leases):
                self.release(side, lease)
        self._leave([side.namespace for side in session.sides if not side.lasting])

    def linger(self, session: Session) -> None:
        """The session ended, its processes may still be at work: its keys in the making go, its memory stays."""
        self.sessions.pop(session.number, None)
        self.lingering[session.number] = session
        self._quarantine(session, session.held_nbytes)
        for lease in [lease for side in session.sides for lease in side.leases.values()]:
            if isinstance(lease, WriteLease):
                for entry in lease.entries.values():
                    self.index.revoke(entry)

    def figures(self) -> dict[str, int]:
        """What the pool holds, in bytes and counts."""
        stats = self.index.stats()
        return {
            "pool_nbytes": self.pool_nbytes,
            "used_nbytes": stats.committed_nbytes + stats.writing_nbytes + stats.dead_nbytes,
            "committed_nbytes": stats.committed_nbytes,
            "writing_nbytes": stats.writing_nbytes,
            "dead_nbytes": stats.dead_nbytes,
            "pinned_nbytes": stats.pinned_nbytes,
            "quarantined_nbytes": self._quarantined.total(),
            "chunks": stats.committed_entries,
            "evictions": stats.evictions,
            "revoked": self.revoked,
            "sessions": len(self.sessions),
            "lingering": len(self.lingering),
        }

    def _quarantine(self, session: Session, nbytes: int) -> None:
        self._quarantined[session.client] += nbytes
        if not self._quarantined[session.client]:
            del self._quarantined[session.client]

    def _leave(self, namespaces: Sequence[bytes]) -> None:
        """Drops what nobody can find any more: of those of these namespaces that no session is in."""
        sessions = (*self.sessions.values(), *self.lingering.values())
        in_use = {side.namespace for session in sessions for side in session.sides}
        for namespace in set(namespaces) - in_use:
            self.index.clear(namespace)
            self.namespaces.forget(namespace)

    def _sampled(self, session: Session, entries: Sequence[IndexEntry]) -> dict[int, bytes]:
        every = session.opening.verify_every
        first = session.fetched_chunks
        session.fetched_chunks += len(entries)
        if not every:
            return {}
        places = range(-first % every, len(entries), every)
        return {place: sums for place in places if (sums := entries[place].sums) is not None}


def is_shaped(entry: IndexEntry, shape: tuple[int, int]) -> bool:
    """Whether a readable chunk is of a session's shape: another one under the same key is not what was asked for."""
    nbytes, sums_nbytes = shape
    return entry.nbytes == nbytes and (not sums_nbytes or len(entry.sums or b"") == sums_nbytes)


def check_namespace(namespace: bytes) -> None:
    """WireError if it is none."""
    if len(namespace) != NAMESPACE_NBYTES:
        raise WireError(f"a namespace has {NAMESPACE_NBYTES} bytes, not {len(namespace)}")


def states_of(namespace: bytes) -> bytes:
    """The namespace of the states at the ends of a namespace's chunks."""
    return hashlib.sha256(b"kvkeep states" + namespace).digest()[:NAMESPACE_NBYTES]


def opening_of_states(opening: Opening) -> Opening:
    """What a session with states says of these."""
    sizes = opening.state_sizes
    return replace(opening, chunk_nbytes=sum(sizes), sizes=sizes, state_sizes=())


def _check(opening: Opening) -> None:
    """WireError if what a planner says of itself cannot be right, or is more than a store takes."""
    check_namespace(opening.namespace)
    if opening.chunk_nbytes <= 0 or opening.verify_every < 0:
        raise WireError("chunk_nbytes must be positive and verify_every not negative")
    ranges = max(len(opening.sizes), len(opening.state_sizes))
    if ranges > MAX_RANGES:
        raise WireError(
            f"a chunk or state of {ranges} ranges is over the bound of {MAX_RANGES}: make the ranges larger"
        )
    if opening.sizes and (sum(opening.sizes) != opening.chunk_nbytes or not all(map(_is_padded, opening.sizes))):
        raise WireError("the sizes of a chunk's ranges must be padded and add up to chunk_nbytes")
    if not all(map(_is_padded, opening.state_sizes)):
        raise WireError("the sizes of a state's ranges must be padded")


def _check_sums(opening: Opening, sums: Sequence[bytes]) -> None:
    """WireError if these are no sums of chunks of such an opening: others would verify with them, and be sent them."""
    expected = opening.sums_nbytes
    for sum_ in sums:
        if expected and len(sum_) != expected:
            raise WireError(f"{len(sum_)} bytes of sums for {len(opening.sizes)} ranges: each has {SUM_NBYTES} bytes")
        if len(sum_) > MAX_UNSIZED_SUMS_NBYTES and not expected:
            raise WireError(
                f"{len(sum_)} bytes of sums for a chunk: at most {MAX_UNSIZED_SUMS_NBYTES} without its sizes"
            )


def _is_padded(nbytes: int) -> bool:
    return nbytes > 0 and padded_nbytes(nbytes) == nbytes
