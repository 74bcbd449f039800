"""The store: one pool, its index, and the sessions that use them. One thread owns all of it, so nothing is locked.

Every call returns at once: a missing chunk and a full pool are values, not errors. Knows nothing about sockets,
messages or the bytes in the pool, which engines' workers move.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvkeep.core.index import Index, IndexEntry, Outcome
from kvkeep.core.layout import padded_nbytes
from kvkeep.store.lent import Early
from kvkeep.store.namespaces import Namespaces, plain_identity, plain_name
from kvkeep.store.openings import (
    MAX_UNSIZED_SUMS_NBYTES,
    Opening,
    check_namespace,
    check_opening,
    check_sums,
    opening_of_states,
    states_of,
)
from kvkeep.store.sessions import ReadLease, Session, WriteLease

MAX_SUMS_NBYTES = 2 << 20  # in one answer: a frame has a bound


class Fetched(NamedTuple):
    """A run of pinned chunks: its lease (0: none), each chunk's offset in the pool, and by index the sums to verify."""

    lease: int
    offsets: list[int]
    sums: dict[int, bytes]


class Reservation(NamedTuple):
    """A write lease (0: none) and for each digest an offset in the pool, or why it has none."""

    lease: int
    offsets: list[int | Outcome]


@dataclass
class Store:
    """`pool_nbytes` of memory under `index`. Waiting requests of one process may pin `max_pinned_share` of it.

    While another process uses the store, one may have as much reserved, ended sessions that linger included. A chunk
    that another lease has been writing for more than `lease_time_s` gets a new writer when it is asked for; the old
    one's memory stays as it is until its lease ends. A chunk in `late`, which a hanging tier reads, gets one at once.
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
    _last_lease: int = 0
    _writing: dict[int, WriteLease] = field(default_factory=dict)
    _quarantined: Counter[int] = field(default_factory=Counter)  # bytes of lingering sessions, by client

    def open(self, opening: Opening) -> Session:
        """A new session; WireError if what the engine says of itself cannot be right."""
        check_opening(opening)
        opening = replace(opening, name=plain_name(opening.name), identity=plain_identity(opening.identity))
        number = self.next_lease()
        session = self.sessions[number] = Session(number, opening, opening.namespace, opening.owner or -number)
        if opening.state_sizes:
            of_states = opening_of_states(opening)
            session.states = Session(self.next_lease(), of_states, states_of(opening.namespace), session.client)
        return session

    def fetch(self, session: Session, digests: Sequence[bytes]) -> Fetched:
        """Pin the longest run of chunks in the pool from the first digest on, within the process's share of it."""
        session.asked = True
        return self.lend(session, self.pin(session, self.keys(session, digests[: self.room(session)])))

    def chunk_nbytes(self, session: Session) -> int:
        """What a chunk of this session takes in the pool (bytes)."""
        return padded_nbytes(session.opening.chunk_nbytes)

    def shape(self, session: Session) -> tuple[int, int]:
        """The bytes that a readable chunk of this session has, and those of its sums (0: any); see `is_shaped`."""
        return self.chunk_nbytes(session), session.opening.sums_nbytes

    def room(self, session: Session) -> int:
        """How many more chunks the session may pin, as far as one answer can carry the sums to verify them."""
        pinned_nbytes = sum(side.pinned_nbytes + side.promised_nbytes for side in self._same_side(session))
        room = max(0, (int(self.pool_nbytes * self.max_pinned_share) - pinned_nbytes) // self.chunk_nbytes(session))
        every, sums_nbytes = session.opening.verify_every, session.opening.sums_nbytes or MAX_UNSIZED_SUMS_NBYTES
        return min(room, every * (MAX_SUMS_NBYTES // sums_nbytes)) if every else room

    def reservable_nbytes(self, session: Session) -> int:
        """How much more its process may reserve: of its share if another process uses the store, else of the pool."""
        others = (other for other in self.sessions.values() if other.client != session.client and other.opening.holders)
        if not any(side.asked for other in others for side in other.sides):
            return self.pool_nbytes
        own = [side for other in self.sessions.values() if other.client == session.client for side in other.sides]
        nbytes = self._quarantined[session.client] + sum(side.reserved_nbytes for side in own)
        return max(0, int(self.pool_nbytes * self.max_pinned_share) - nbytes)

    def pin(self, session: Session, keys: Sequence[bytes]) -> list[IndexEntry]:
        """Pin the longest run of readable chunks that have the session's shape."""
        nbytes, sums_nbytes = self.shape(session)
        entries = self.index.pin_prefix(keys)
        for count, entry in enumerate(entries):
            if entry.nbytes != nbytes or (sums_nbytes and len(entry.sums or b"") != sums_nbytes):
                self.index.unpin(entries[count:])
                return entries[:count]
        return entries

    def lend(self, session: Session, entries: list[IndexEntry], early: Sequence[Early] = ()) -> Fetched:
        """A lease on these chunks, which takes over their pins; those that are lent `early` have none yet."""
        if not entries:
            return Fetched(0, [], {})
        coming = {loan.entry for loan in early}
        number = self.next_lease()
        lease = session.leases[number] = ReadLease([entry for entry in entries if entry not in coming], early)
        session.pinned_nbytes += lease.nbytes
        for loan in early:
            loan.leases += 1
        return Fetched(number, [entry.offset for entry in entries], self._sums_to_verify(session, entries))

    def reserve(self, session: Session, digests: Sequence[bytes]) -> Reservation:
        """Reserve room for the chunks that are absent, within its process's share; what cannot fit evicts nothing."""
        if not self.lending:
            return Reservation(0, [Outcome.NO_ROOM] * len(digests))
        session.asked = True
        number = self.next_lease()
        keys = self.keys(session, digests)
        self.revoke_overdue(keys)
        most = self.reservable_nbytes(session) // self.chunk_nbytes(session)
        got = self.index.reserve(keys, session.opening.chunk_nbytes, number, most)
        entries = {index: entry for index, entry in enumerate(got) if isinstance(entry, IndexEntry)}
        if entries:
            lease = session.leases[number] = self._writing[number] = WriteLease(entries, self.clock())
            session.reserved_nbytes += lease.nbytes
        offsets = [entry.offset if isinstance(entry, IndexEntry) else entry for entry in got]
        return Reservation(number if entries else 0, offsets)

    def revoke_overdue(self, keys: Sequence[bytes]) -> None:
        """Take from their writers those of `keys` that are late, or whose writer was not seen for `lease_time_s`."""
        if not self._writing and not self.late:
            return
        since_s = self.clock() - self.lease_time_s
        for entry in self.index.writing(keys):
            lease = self._writing.get(entry.owner)
            if entry in self.late or (lease is not None and lease.alive_s <= since_s):
                self.index.revoke(entry)
                self.revoked += 1

    def written(self, session: Session, number: int, indexes: Sequence[int]) -> list[IndexEntry | None]:
        """The entries at these indexes of a reservation; None where its lease has none."""
        lease = session.leases.get(number)
        return [lease.entries.get(index) if isinstance(lease, WriteLease) else None for index in indexes]

    def commit(self, session: Session, number: int, indexes: Sequence[int], sums: Sequence[bytes]) -> list[bool]:
        """Make reserved chunks readable; False where a chunk was cleared meanwhile or its lease does not have it.

        WireError, and nothing is committed, if a chunk does not have a sum for each of its ranges.
        """
        lease = session.leases.get(number)
        if not isinstance(lease, WriteLease) or len(indexes) != len(sums):
            return [False] * len(indexes)
        check_sums(session.opening, sums)
        lease.alive_s = self.clock()
        done = []
        for index, chunk_sums in zip(indexes, sums, strict=True):
            entry = lease.entries.pop(index, None)
            session.reserved_nbytes -= entry.nbytes if entry is not None else 0
            done.append(entry is not None and self.index.commit(entry, chunk_sums))
        return done

    def release(self, session: Session, number: int) -> None:
        """End a lease; nothing if there is none (it has ended, or was invented)."""
        lease = session.leases.pop(number, None)
        self._writing.pop(number, None)
        if isinstance(lease, ReadLease):
            session.pinned_nbytes -= lease.nbytes
            self.index.unpin(lease.entries)
            for early in lease.early:
                early.release(self.index)
        elif lease is not None:
            session.reserved_nbytes -= lease.nbytes
            for entry in lease.entries.values():
                self.index.abandon(entry)

    def keys(self, session: Session, digests: Sequence[bytes]) -> list[bytes]:
        """The keys of a session's digests, whose lengths the wire has checked."""
        namespace = session.namespace
        return [namespace + digest for digest in digests]

    def next_lease(self) -> int:
        """A number that no lease and no session has had."""
        self._last_lease += 1
        return self._last_lease

    def discard(self, session: Session, digests: Sequence[bytes]) -> int:
        """Take chunks and states out of the index; their memory is free when the last lease on them ends."""
        return sum(self.index.discard(self.keys(side, digests)) for side in session.sides)

    def clear(self, session: Session, everything: bool) -> int:
        """Drop the chunks of the session's namespaces, or all; how many."""
        return sum(self.index.clear(namespace) for namespace in self.namespaces_of(session, everything))

    def namespaces_of(self, session: Session, everything: bool = False) -> list[bytes | None]:
        """What to clear for a session: its namespaces, or (None) everything."""
        return [None] if everything else [side.namespace for side in session.sides]

    def rename(self, session: Session, namespace: bytes, lasting: bool = True) -> None:
        """Put the session's keys into `namespace` from here on; see `Session` for `lasting`."""
        check_namespace(namespace)
        left = [side.namespace for side in session.sides if not side.lasting]
        session.namespace, session.lasting = namespace, lasting
        if session.states is not None:
            session.states.namespace, session.states.lasting = states_of(namespace), lasting
        self._forget(left)

    def close(self, session: Session) -> None:
        """End a session none of whose processes touches its memory any more: all of it is free."""
        self.sessions.pop(session.number, None)
        if self.lingering.pop(session.number, None) is not None:
            self._quarantine(session, -session.held_nbytes)
        for side in session.sides:
            for lease in list(side.leases):
                self.release(side, lease)
        self._forget([side.namespace for side in session.sides if not side.lasting])

    def linger(self, session: Session) -> None:
        """Drop its uncommitted keys; keep its memory until its processes exit."""
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

    def _same_side(self, session: Session) -> list[Session]:
        """The sides of its process's sessions, lingering ones too, that are for what it is for: chunks or states."""
        everyone = (*self.sessions.values(), *self.lingering.values())
        own = [other for other in everyone if other.client == session.client]
        states = [other.states for other in own if other.states is not None]
        return states if any(side is session for side in states) else own

    def _forget(self, namespaces: Sequence[bytes]) -> None:
        """Drop the chunks of those of these namespaces that no session is in: nobody can find them any more."""
        sessions = (*self.sessions.values(), *self.lingering.values())
        in_use = {side.namespace for session in sessions for side in session.sides}
        for namespace in set(namespaces) - in_use:
            self.index.clear(namespace)
            self.namespaces.forget(namespace)

    def _sums_to_verify(self, session: Session, entries: Sequence[IndexEntry]) -> dict[int, bytes]:
        every = session.opening.verify_every
        first = session.fetched_chunks
        session.fetched_chunks += len(entries)
        if not every:
            return {}
        indexes = range(-first % every, len(entries), every)
        return {index: sums for index in indexes if (sums := entries[index].sums) is not None}


def is_shaped(entry: IndexEntry, shape: tuple[int, int]) -> bool:
    """Whether a readable chunk has a session's shape; one of another shape under the same key is a miss."""
    nbytes, sums_nbytes = shape
    return entry.nbytes == nbytes and (not sums_nbytes or len(entry.sums or b"") == sums_nbytes)
