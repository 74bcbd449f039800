"""A fetch: what the store has of a prompt's chunks, pinned under a lease, and why it has no more.

Where the model has recurrent layers a prefix is of use only up to a chunk at whose end there is a state, and few have
one. A state is a chunk of another namespace, under the same digest. Knows nothing about sockets or messages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from kvkeep.store.below.filler import Filler
from kvkeep.store.below.reads import Until
from kvkeep.store.below.run import POOL, Run
from kvkeep.store.sessions import Session
from kvkeep.store.store import Fetched, Store
from kvkeep.telemetry import Miss


class FetchLimits(NamedTuple):
    """How long a fetch waits, after what time a tier has failed (seconds), whether chunks may be lent `early`."""

    deadline_s: float
    limit_s: float = 0.0
    early: bool = False


class FoundState(NamedTuple):
    """The state at the end of a run, one chunk long, and where it was."""

    fetched: Fetched
    source: str


class Found(NamedTuple):
    """The run that is pinned, how many of its chunks came from where, and why the next one is missing.

    `took_s` is how long it waited for tiers. `progress` has the indexes of chunks that are still being read, each with
    the offset of its progress word in the region. In a session that has states `state` is at the end of the run.
    """

    fetched: Fetched
    sources: Mapping[str, int]
    why: Miss | None
    took_s: float = 0.0
    progress: Mapping[int, int] = MappingProxyType({})
    state: FoundState | None = None


@dataclass
class Fetches:
    """Fetches of all sessions from `store` and, by `filler`, from what is below it."""

    store: Store
    filler: Filler

    def at_once(self, session: Session, digests: Sequence[bytes], limits: FetchLimits) -> Found | None:
        """The answer to a fetch if no tier can add to what the pool has; None: it takes a while."""
        if session.states is not None:
            return None
        room = self.store.room(session)
        may_wait = self.filler.may_help(session, limits.deadline_s)
        if may_wait and not all(self.store.index.contains(self.store.keys(session, digests[:room]))):
            return None
        fetched = self.store.fetch(session, digests)
        count = len(fetched.offsets)
        why = None if count == len(digests) else Miss.PINNED_SHARE if count == room else Miss.NOT_STORED
        if why is Miss.NOT_STORED and limits.deadline_s > 0:
            why = self.filler.absent(session)
        return Found(fetched, {POOL: count} if count else {}, why)

    async def fetch(self, session: Session, digests: Sequence[bytes], limits: FetchLimits) -> Found:
        """Pin the longest run from the first digest on, brought from tiers for at most `limits.deadline_s`.

        How long a fetch waits says nothing about a tier: that has failed after `limits.limit_s`, where that is more.
        A fetch that is cancelled, for its client has gone, leaves nothing pinned.
        """
        found = self.at_once(session, digests, limits)
        if found is not None:
            return found
        session.asked = True
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        until = Until(began_s + limits.deadline_s, max(limits.deadline_s, limits.limit_s))
        if session.states is not None:
            found = await self._to_a_state(session, session.states, digests, until)
        else:
            with Run(self.store, session, digests) as run:
                await self.filler.fill(run, until, limits.early)
                found = _lent(run)
        return found._replace(took_s=now_s() - began_s)

    async def _to_a_state(self, session: Session, states: Session, digests: Sequence[bytes], until: Until) -> Found:
        """The run that ends at the last state that comes; the tiers are read only for what leads to a state."""
        ends, in_time = await self._state_indexes(states, digests, until)
        with Run(self.store, session, digests[: ends[-1] + 1 if ends else 0]) as run:
            await self.filler.fill(run, until)
            why = run.why
            if not in_time and why in (None, Miss.NOT_STORED):
                why = Miss.TIER_LATE
            for index in (index for index in reversed(ends) if index < len(run.chunks)):
                with Run(self.store, states, [digests[index]]) as state:
                    await self.filler.fill(state, until)
                    run.touch()  # a chunk may have been discarded while a tier gave the state
                    if state.chunks and index < len(run.chunks):
                        if index + 1 < len(digests):
                            run.cut(index + 1, why or Miss.NO_STATE)
                        found = FoundState(fetched=state.lend(), source=state.sources[0])
                        return _lent(run)._replace(state=found)
                    why = why or (state.why if state.why is not Miss.NOT_STORED else None)
        return Found(Fetched(0, [], {}), {}, why or self._no_state(session, digests, ends))

    async def _state_indexes(self, states: Session, digests: Sequence[bytes], until: Until) -> tuple[list[int], bool]:
        """The chunks at whose ends the pool or a tier has a state, in order; whether all tiers have said so in time."""
        keys = self.store.keys(states, digests)
        known = dict(enumerate(self.store.index.contains(keys)))
        lacking, in_time = [index for index, here in known.items() if not here], True
        if self.filler.may_help(states, until.left_s):
            where, in_time = await self.filler.locate(states, [keys[index] for index in lacking], until)
            known |= {index: tier is not None for index, tier in zip(lacking, where, strict=True)}
        return [index for index, there in known.items() if there], in_time

    def _no_state(self, session: Session, digests: Sequence[bytes], ends: Sequence[int]) -> Miss:
        """Why there is no state although nothing failed: a tier that cannot be asked now may have one."""
        kept = bool(ends) or any(self.store.index.contains(self.store.keys(session, digests[:1])))
        why = self.filler.absent(session)
        return Miss.NO_STATE if kept and why is Miss.NOT_STORED else why


def _lent(run: Run) -> Found:
    sources, progress = dict(Counter(run.sources)), run.progress
    return Found(run.lend(), sources, run.why, progress=progress)
