"""Sessions whose client is gone while some of its processes may still touch their memory.

Frees that memory when all these processes have ended, which their pidfds tell the store's event loop. Knows nothing
about messages.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from kvkeep.store.sessions import Session
from kvkeep.store.store import Store
from kvkeep.wire.processes import Holders

log = logging.getLogger("kvkeep.store")


@dataclass
class Lingering:
    """The lingering sessions of `store`, by number, each with the processes that may still run."""

    store: Store
    loop: asyncio.AbstractEventLoop
    _holders: dict[int, Holders] = field(default_factory=dict)

    def add(self, session: Session, holders: Holders) -> None:
        """Adds a session, and owns `holders`. Ends a session that holds nothing at once."""
        self.store.linger(session)
        self._holders[session.number] = holders
        for pidfd in list(holders.alive):
            try:
                self.loop.add_reader(pidfd, self._died, session, pidfd)
            except OSError:  # the kernel does not watch this one, so nobody knows when that process ends
                holders.doubt = True
        if holders.gone or not any(side.leases for side in session.sides):
            self._end(session)
        elif holders.doubt:
            log.warning(
                "session %d (%s) ended, and nobody can see whether one of its processes still runs: its memory stays "
                "out of use until this store ends",
                session.number,
                session.opening.name,
            )

    def resume(self, number: int, holders: Holders) -> None:
        """Ends a lingering session if each of its processes is surely one of `holders`, which use nothing of it."""
        old = self._holders.get(number)
        if old is not None and old.within(holders):
            self._end(self.store.lingering[number])

    def close(self) -> None:
        """Stops watching; the memory goes with the store."""
        for holders in self._holders.values():
            self._unwatch(holders)

    def _died(self, session: Session, pidfd: int) -> None:
        holders = self._holders[session.number]  # `_end` has removed the readers of a session that was resumed
        self.loop.remove_reader(pidfd)
        holders.died(pidfd)
        if holders.gone:
            self._end(session)

    def _end(self, session: Session) -> None:
        self._unwatch(self._holders.pop(session.number))
        self.store.close(session)

    def _unwatch(self, holders: Holders) -> None:
        for pidfd in holders.alive:
            self.loop.remove_reader(pidfd)
        holders.close()
