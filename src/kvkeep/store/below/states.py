"""Fetches of prefixes that are of use only up to a chunk at whose end there is a state (recurrent models).

A state is kept apart from its chunk, under the same digest in a namespace of its own: few chunks have one. What has to
come from a tier is read only as far as the last chunk that has a state. Knows nothing about sockets or how a tier keeps
what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from kvkeep.errors import TierError
from kvkeep.store.below.breaker import Gate
from kvkeep.store.below.promote import Promotions
from kvkeep.store.below.reads import TierReads
from kvkeep.store.below.waiting import FetchLimits, Found
from kvkeep.store.sessions import Session
from kvkeep.store.store import Fetched, Why


class FoundState(NamedTuple):
    """A run of chunks that ends where `state` is: the pinned state, one chunk long; None: nothing is held."""

    run: Found
    state: Found | None


@dataclass
class StateFetches:
    """Fetches of all sessions that have states; one ends with its session and holds nothing then."""

    promotions: Promotions
    _tasks: dict[asyncio.Task[None], Session] = field(default_factory=dict)
    _asked: set[asyncio.Task[Any]] = field(default_factory=set)

    def fetch(
        self,
        session: Session,
        digests: Sequence[bytes],
        limits: FetchLimits,
        answer: Callable[[FoundState], None],
    ) -> None:
        """Answers at the latest after its deadline, as `Promotions.fetch` does, but never early."""
        task = asyncio.get_running_loop().create_task(self._fetch(session, digests, limits, answer))
        self._tasks[task] = session
        task.add_done_callback(self._over)

    def forget(self, session: Session) -> None:
        """The session is over: its fetches are not answered."""
        for task in [task for task, one in self._tasks.items() if one is session]:
            task.cancel()
        for side in session.sides:
            self.promotions.forget(side)

    def _over(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.result()

    async def _fetch(
        self,
        session: Session,
        digests: Sequence[bytes],
        limits: FetchLimits,
        answer: Callable[[FoundState], None],
    ) -> None:
        loop, store = asyncio.get_running_loop(), self.promotions.store
        began_s, deadline_s = loop.time(), limits.deadline_s

        def left_s() -> float:
            return max(0.0, began_s + deadline_s - loop.time())

        assert session.states is not None
        places = await self._places(session.states, digests, left_s, max(deadline_s, limits.limit_s))
        reach = places[-1] + 1 if places else 0
        run = await self._promoted(session, digests[:reach], left_s(), limits.limit_s)
        have = len(run.fetched.offsets)
        state, missed = None, run.why
        for place in [place for place in reversed(places) if place < have]:
            state = await self._promoted(session.states, [digests[place]], left_s(), limits.limit_s)
            if state.fetched.lease:
                have = place + 1
                break
            missed = missed or (state.why if state.why is not Why.ABSENT else None)
        if state is None or not state.fetched.lease:
            store.release(session, run.fetched.lease)
            kept = store.index.contains(store.keys(session, digests[:1]))
            run = Found(Fetched(0, [], {}), {}, missed or self._absent(any(kept) or bool(places)))
            state = None
        elif have < len(digests):
            run = _cut(run, have)._replace(why=missed or Why.NO_STATE)
        answer(FoundState(run._replace(took_s=loop.time() - began_s), state))

    def _absent(self, kept: bool) -> Why:
        """Why there is no state, where chunks are `kept` or not: a tier that cannot be asked now may have one."""
        why = self.promotions.absent()
        return Why.NO_STATE if kept and why is Why.ABSENT else why

    async def _places(
        self, states: Session, digests: Sequence[bytes], left_s: Callable[[], float], limit_s: float
    ) -> list[int]:
        """The places of all chunks at whose ends the pool or a tier has a state, in order."""
        keys = self.promotions.store.keys(states, digests)
        known = self.promotions.store.index.contains(keys)
        loop = asyncio.get_running_loop()
        for tier in self.promotions.tiers:
            gate = tier.gate()
            if gate is Gate.HALF_OPEN:
                self.promotions.probe(tier, keys, states, limit_s)
            if not left_s() or gate is not Gate.CLOSED:
                continue
            late_s = loop.time() + limit_s
            task: asyncio.Task[Any] = loop.create_task(_listed(tier, keys))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
            await asyncio.wait({task}, timeout=left_s())  # not wait_for, which waits for what it cancels
            if not task.done():
                loop.call_at(late_s, _silent, tier, task)
            has = task.result() if task.done() else None
            known = [one or here for one, here in zip(known, has or known, strict=True)]
        return [place for place, one in enumerate(known) if one]

    async def _promoted(self, side: Session, digests: Sequence[bytes], deadline_s: float, limit_s: float) -> Found:
        """The longest run of these in the pool, brought from tiers where needed; held by a lease."""
        found: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self.promotions.fetch(side, digests, FetchLimits(deadline_s, limit_s), partial(_settle, found))
        return await found


async def _listed(tier: TierReads, keys: Sequence[bytes]) -> list[bool] | None:
    """What a tier says it has; None if it cannot say."""
    try:
        return await tier.tier.contains(keys)
    except TierError as error:
        tier.overdue((), str(error))
        return None


def _silent(tier: TierReads, asked: asyncio.Task[Any]) -> None:
    if not asked.done():
        tier.overdue((), "it does not say what it has")


def _settle(found: asyncio.Future[Found], answer: Found) -> None:
    if not found.done():  # else its fetch was cancelled, and its session's leases end with it
        found.set_result(answer)


def _cut(run: Found, have: int) -> Found:
    """The first `have` chunks of a run; what is held beyond them stays in its lease."""
    lease, offsets, sums = run.fetched
    sources, left = {}, have
    for source, count in run.sources.items():
        sources[source] = min(count, left)
        left -= sources[source]
    kept = Fetched(lease, offsets[:have], {place: one for place, one in sums.items() if place < have})
    return run._replace(fetched=kept, sources={source: count for source, count in sources.items() if count})
