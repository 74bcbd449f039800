"""The store's answers to an engine's messages, made at once, and the checks of its index.

Knows nothing about sockets or frames.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from kvkeep.core.index import Outcome
from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import WireError
from kvkeep.store.below.fetches import Found
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.telemetry import Figure
from kvkeep.wire import messages as m

log = logging.getLogger("kvkeep.store")

CHECK_SHARE = 20  # checks of the index take at most one twentieth of the time ...
LONGEST_CHECK_PAUSE_S = 2.0  # ... unless one takes very long
_OUTCOMES = {Outcome.PRESENT: m.PRESENT, Outcome.BUSY: m.BUSY, Outcome.NO_ROOM: m.NO_ROOM}


@dataclass
class Answers:
    """Answers over `walk`, in the start of the store that `boot` names; only the event loop's thread may ask."""

    walk: TierWalk
    boot: bytes

    @property
    def store(self) -> Store:
        """The pool's own store."""
        return self.walk.store

    def asked(self, session: Session, message: m.ToStore) -> m.FromStore | None:
        """The answer to a message of an open session, None where it has none."""
        store = self.store
        match message:
            case m.Reserve():
                side = session.states if message.states else session
                if side is None:
                    raise WireError("it has no states")
                lease, got = store.reserve(side, m.split_digests(message.digests))
                offsets = [_OUTCOMES[entry] if isinstance(entry, Outcome) else entry for entry in got]
                return m.Granted(message.call, m.StoreLease(self.boot, lease), offsets)
            case m.Commit():
                side = session.side_of(message.lease)
                entries = store.written(side, message.lease, message.indexes)
                done = store.commit(side, message.lease, message.indexes, message.sums)
                self.walk.committed(side, list(itertools.compress(entries, done)))
                return m.Committed(message.call, done, *self.fill())
            case m.Release():
                store.release(session.side_of(message.lease), message.lease)
            case m.Rename():
                self._rename(session, message)
        return None

    def matched(self, call: int, found: Found) -> m.Matched:
        """The answer to a fetch."""
        lease, offsets, sums = found.fetched
        used_nbytes, pinned_nbytes = self.fill()
        return m.Matched(
            call=call,
            lease=m.StoreLease(self.boot, lease),
            offsets=offsets,
            sums=sums,
            sources=dict(found.sources),
            why=found.why,
            took_s=found.took_s,
            state=self._state_of(found),
            progress=dict(found.progress),
            used_nbytes=used_nbytes,
            pinned_nbytes=pinned_nbytes,
        )

    def _state_of(self, found: Found) -> m.HeldState | None:
        """The state at the end of a run, as a part of its answer."""
        if found.state is None:
            return None
        (lease, offsets, sums), source = found.state
        return m.HeldState(m.StoreLease(self.boot, lease), offsets[0], sums.get(0, b""), source)

    def stats(self, call: int) -> m.Stats:
        """The answer to a question for figures without a check."""
        return m.Stats(call=call, rows=self.figures(), out=self.walk.out)

    def name(self, session: Session, identity: str) -> None:
        """Notes what a session's namespace is; the log says why this engine will not find another's chunks."""
        apart = self.store.namespaces.name(session.namespace, session.opening.name, identity)
        if apart:
            log.info("session %d shares nothing with the one before: %s", session.number, "; ".join(apart))

    def figures(self) -> list[Figure]:
        """What the pool and the tiers hold and did."""
        return [*(Figure(name, "", value) for name, value in self.store.figures().items()), *self.walk.figures()]

    def fill(self) -> tuple[int, int]:
        """How many bytes of the pool hold chunks, and how many leases hold."""
        stats = self.store.index.stats()
        return stats.committed_nbytes + stats.writing_nbytes + stats.dead_nbytes, stats.pinned_nbytes

    def checked(self) -> m.Stats:
        """All figures, what is wrong with the index, and the namespaces; for the call number 0."""
        counts = self.store.index.prefixes(NAMESPACE_NBYTES)
        known = [m.Known(key, *named, counts[key]) for key, named in self.store.namespaces.known.items()]
        problem = self.store.index.check()
        return m.Stats(call=0, rows=self.figures(), problem=problem, known=known, out=self.walk.out)

    def _rename(self, session: Session, asked: m.Rename) -> None:
        if asked.namespace != session.namespace:
            log.info(
                "session %d (%s) has a namespace of its own from here on%s; its chunks until now stay for others",
                session.number,
                session.opening.name,
                "" if asked.lasting else ", which ends with it and goes to no disk",
            )
        self.store.rename(session, asked.namespace, asked.lasting)
        self.store.namespaces.name(session.namespace, session.opening.name, asked.identity)


@dataclass
class Checks:
    """Checks of the index for all clients: one at a time, and at most a share of the store's time for them.

    `check` makes one. All who ask before the next one is due share it.
    """

    check: Callable[[], m.Stats]
    loop: asyncio.AbstractEventLoop
    _asking: list[Callable[[m.Stats], None]] = field(default_factory=list)
    _due_s: float = 0.0

    def ask(self, answer: Callable[[m.Stats], None]) -> None:
        """Calls `answer` with the result of a check that starts later than this call."""
        self._asking.append(answer)
        if len(self._asking) == 1:
            self.loop.call_at(max(self.loop.time(), self._due_s), self._run)

    def _run(self) -> None:
        began_s = self.loop.time()
        stats = self.check()
        took_s = self.loop.time() - began_s
        self._due_s = began_s + took_s + min(LONGEST_CHECK_PAUSE_S, CHECK_SHARE * took_s)
        asking, self._asking = self._asking, []
        for answer in asking:
            answer(stats)
