"""Promotion: a fetch looks in the pool, then down the tiers, and brings what they hold into the pool.

The tiers are asked only for what the pool lacks, in the order of the prefix; room is reserved only for what one of them
holds, and never waited for. A chunk that several requests want is read once. At its deadline a request gets what has
come; the rest comes later, for others. One that is asked for `early` is answered as soon as its chunks are located and
have room. Knows nothing about sockets, or about how a tier keeps its chunks.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import IndexEntry, Outcome
from kvkeep.errors import TierError
from kvkeep.memory.progress import Words
from kvkeep.store.below.breaker import Gate
from kvkeep.store.below.reads import Coming, TierReads
from kvkeep.store.below.waiting import FetchLimits, Found, Waiting
from kvkeep.store.lent import Early
from kvkeep.store.sessions import Session
from kvkeep.store.store import Fetched, Store, Why, is_shaped

POOL = "pool"
FIGURES = ("promoted", "not_loaded", "lent_early", "failed_early")


@dataclass
class Promotions:
    """Fetches of all sessions over `tiers`, the best first; `promoted` is told of each chunk that came from which.

    `words` are for chunks that are lent while they are read; without any no chunk is. `opening`: more tiers will come.
    """

    store: Store
    tiers: Sequence[TierReads] = ()
    promoted: Callable[[IndexEntry, Sequence[int], int], None] = lambda entry, sizes, tier: None
    words: Words | None = None
    opening: bool = False
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0))
    _coming: dict[bytes, Coming] = field(default_factory=dict)
    _waiting: set[Waiting] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        """Whether any tier is being read for somebody."""
        return any(tier.busy for tier in self.tiers)

    def fetch(
        self,
        session: Session,
        digests: Sequence[bytes],
        limits: FetchLimits,
        answer: Callable[[Found], None],
    ) -> None:
        """Answers now, if the pool has it all or nothing below it can help; else at the latest after `deadline_s`.

        How long a request waits says nothing about a tier: that has failed if it takes `limit_s`, where that is more.
        """
        deadline_s = limits.deadline_s
        room = self.store.room(session)
        fetched = self.store.fetch(session, digests)
        here = len(fetched.offsets)
        why = None if here == len(digests) else Why.SHARE if here == room else Why.ABSENT
        if why is Why.ABSENT and session.opening.sizes and deadline_s > 0:
            why = self.absent()
        if why in (None, Why.SHARE) or not self.tiers or not session.opening.sizes or deadline_s <= 0:
            answer(Found(fetched, {POOL: here} if here else {}, why))
            return
        waiting = self._wait_with(session, fetched, self.store.keys(session, digests), room, answer)
        waiting.timer = asyncio.get_running_loop().call_later(deadline_s, self._expire, waiting)
        limit_s = max(deadline_s, limits.limit_s)
        waiting.early = limits.early
        waiting.late_s = limit_s - deadline_s
        self._go(self._promote(waiting, here, limit_s))

    def _wait_with(
        self, session: Session, fetched: Fetched, keys: list[bytes], room: int, answer: Callable[[Found], None]
    ) -> Waiting:
        """A fetch that goes on below the pool: its lease becomes pins of its own until it is answered."""
        held = dict(enumerate(self.store.pin(session, keys[: len(fetched.offsets)])))
        self.store.release(session, fetched.lease)
        reach = min(room, len(keys))
        now_s = asyncio.get_running_loop().time()
        waiting = Waiting(session, keys, answer, reach * self.store.taken(session), now_s, held=held, reach=reach)
        waiting.why = None if reach == len(keys) else Why.SHARE
        waiting.sources = dict.fromkeys(held, POOL)
        session.promised_nbytes += waiting.promised_nbytes
        self._waiting.add(waiting)
        return waiting

    def forget(self, session: Session) -> None:
        """The session is over: its fetches are not answered and hold nothing."""
        for waiting in [one for one in self._waiting if one.session is session]:
            self._end(waiting)
            self.store.index.unpin(waiting.held.values())

    def absent(self) -> Why:
        """Why a chunk that no tier says to have is missed: those that cannot be asked now may have it."""
        if any(tier.gate() is not Gate.CLOSED for tier in self.tiers):
            return Why.LEFT_ALONE
        return Why.OPENING if self.opening else Why.ABSENT

    async def _promote(self, waiting: Waiting, first: int, limit_s: float) -> None:
        where = await self._located(waiting, first, limit_s)
        if waiting.over:
            return
        wanted = self._plan(waiting, first, where)
        started = self._reserved(waiting, wanted, where, first)
        waiting.located = True
        if waiting.complete:
            self._finish(waiting)
        elif waiting.early:
            self._finish_early(waiting, limit_s)
        for number, tier in enumerate(self.tiers):
            tier.add([coming for coming in started if coming.tier == number], limit_s)

    async def _located(self, waiting: Waiting, first: int, limit_s: float) -> list[int | None]:
        """For each key from place `first` to its reach, the first working tier that has it."""
        keys = waiting.keys[first : waiting.reach]
        where: list[int | None] = [None] * len(keys)
        for number, tier in enumerate(self.tiers):
            open_places = [place for place, one in enumerate(where) if one is None]
            asked = [keys[place] for place in open_places]
            gate = tier.gate()
            if gate is Gate.HALF_OPEN:
                self.probe(tier, asked, waiting.session, limit_s)
            if gate is not Gate.CLOSED or not asked:
                continue
            waiting.asking = tier
            try:
                has = await tier.tier.contains(asked)
            except TierError as error:
                tier.overdue((), str(error))
                continue
            finally:
                waiting.asking = None
            for place, one in zip(open_places, has, strict=True):
                where[place] = number if one else None
        return where

    def probe(self, tier: TierReads, keys: Sequence[bytes], session: Session, limit_s: float) -> None:
        """Tries a tier that had failed with the first chunk that it has of these; nobody waits for it."""
        if tier.may_probe:  # else what hangs tells by coming back
            tier.probes += 1
            tier.breaker.probing(asyncio.get_running_loop().time())
            self._go(self._probe(tier, keys, session, limit_s))

    async def _probe(self, tier: TierReads, keys: Sequence[bytes], session: Session, limit_s: float) -> None:
        coming = None
        try:
            coming = self._reserved_one(tier, await tier.tier.contains(keys), keys, session)
        except TierError as error:
            tier.overdue((), str(error))
        finally:
            tier.probes -= coming is None
        if coming is not None:
            tier.add([coming], limit_s)

    def _reserved_one(
        self, tier: TierReads, has: Sequence[bool], keys: Sequence[bytes], session: Session
    ) -> Coming | None:
        """Room for the first chunk that a tier has and that is not on its way, which is to be its probe."""
        number, sizes = self.tiers.index(tier), session.opening.sizes

        def over(_: IndexEntry | None) -> None:
            tier.probes -= 1

        wanted = [key for key, one in zip(keys, has, strict=True) if one and key not in self._coming][:1]
        got = self.store.index.reserve(wanted, sum(sizes), self.store.next_lease())
        for entry in got:
            if isinstance(entry, IndexEntry):
                coming = self._coming[entry.key] = Coming(entry, sizes, number, [over])
                return coming
        return None

    def _plan(self, waiting: Waiting, first: int, where: Sequence[int | None]) -> list[int]:
        """Holds what the pool has by now and joins what is coming; the places that have to be loaded, in order."""
        wanted: list[int] = []
        index, shape = self.store.index, self.store.shape(waiting.session)
        for place, tier in enumerate(where, first):
            key = waiting.keys[place]
            entry = index.hold(key)
            if entry is not None and is_shaped(entry, shape):
                waiting.held[place], waiting.sources[place] = entry, POOL
                continue
            if entry is not None:  # of another shape: not what was asked for
                index.unpin([entry])
                waiting.cut(place, Why.ABSENT)
            elif key in self._coming and self._hopeless(self._coming[key]):
                waiting.cut(place, Why.NOT_LOADED)
            elif key in self._coming:
                self._await(waiting, place, self._coming[key])
            elif tier is None:
                waiting.cut(place, self.absent())
            else:
                wanted.append(place)
            if waiting.reach <= place:
                break
        return wanted

    def _reserved(
        self, waiting: Waiting, wanted: Sequence[int], where: Sequence[int | None], first: int
    ) -> list[Coming]:
        """Reserves room for the wanted chunks, as far as there is any now."""
        sizes = waiting.session.opening.sizes
        keys = [waiting.keys[place] for place in wanted]
        self.store.revoke_overdue(keys)
        got = self.store.index.reserve(keys, sum(sizes), self.store.next_lease()) if keys else []
        started: list[Coming] = []
        for place, one in zip(wanted, got, strict=True):
            if not isinstance(one, IndexEntry):
                waiting.cut(place, Why.NO_ROOM if one is Outcome.NO_ROOM else Why.BUSY)
            elif place >= waiting.reach:
                self.store.index.abandon(one)
            else:
                tier = where[place - first]
                assert tier is not None
                started.append(Coming(one, sizes, tier))
                self._coming[one.key] = started[-1]
                self._await(waiting, place, started[-1])
        return started

    def _await(self, waiting: Waiting, place: int, coming: Coming) -> None:
        waiting.pending.add(place)
        waiting.sources[place] = self.tiers[coming.tier].name
        coming.waiters.append(functools.partial(self._came, waiting, place, coming))

    def _came(self, waiting: Waiting, place: int, coming: Coming, entry: IndexEntry | None) -> None:
        """A chunk that a fetch waits for is readable, or will not come."""
        if waiting.over:
            return
        waiting.pending.discard(place)
        held = self.store.index.hold(entry.key) if entry is not None else None
        if held is None:
            waiting.cut(place, Why.EVICTED if coming.gone else Why.NOT_LOADED)
        else:
            waiting.held[place] = held
        if waiting.complete:
            self._finish(waiting)

    def settle(self, coming: Coming, sums: bytes | None) -> None:
        """A tier is done with a chunk's memory: it becomes readable, or its room comes back."""
        self._coming.pop(coming.entry.key, None)
        self.store.late.discard(coming.entry)
        self.figures["not_loaded"] += sums is None
        if self._readable(coming, sums):
            self.figures["promoted"] += 1
            coming.tell(coming.entry)
            self.promoted(coming.entry, coming.sizes, coming.tier)
        else:
            coming.tell(None)

    def _readable(self, coming: Coming, sums: bytes | None) -> bool:
        """Ends the making of a chunk; False if it did not come, or was cleared meanwhile."""
        index = self.store.index
        if coming.early is not None:
            held = coming.early.leases
            readable = coming.early.settle(index, sums)
            self.figures["failed_early"] += bool(held and not readable)
            return readable
        if sums is None:
            index.abandon(coming.entry)
            return False
        return index.commit(coming.entry, sums)

    def _expire(self, waiting: Waiting) -> None:
        missing = [place for place in waiting.pending if place < waiting.reach]
        waiting.cut(min(missing) if waiting.located else len(waiting.held), Why.DEADLINE)
        if waiting.asking is not None and waiting.late_s:
            asyncio.get_running_loop().call_later(waiting.late_s, self._silent, waiting)
        else:
            self._silent(waiting)
        self._finish(waiting)

    def _silent(self, waiting: Waiting) -> None:
        """A tier that has not said by now what it has does not work."""
        if waiting.asking is not None:
            waiting.asking.overdue((), "it does not say what it has")

    def _finish(self, waiting: Waiting) -> None:
        self._end(waiting)
        # pinned again as one run, so that the tail ages before the head
        entries = self.store.pin(waiting.session, waiting.keys[: waiting.reach])
        self.store.index.unpin(waiting.held.values())
        sources = waiting.counted(len(entries))
        fetched = self.store.lend(waiting.session, entries)
        waiting.answer(Found(fetched, sources, waiting.why, self._took_s(waiting)))

    def _finish_early(self, waiting: Waiting, limit_s: float) -> None:
        """Answers although chunks are still being read, unless words are short: then it waits for them as ever."""
        coming = {place: self._coming[waiting.keys[place]] for place in waiting.pending if place < waiting.reach}
        fresh = [one for one in coming.values() if one.early is None]
        if self.words is None or len(fresh) > self.words.free or any(map(self._doubtful, coming.values())):
            return
        for one in fresh:
            one.early = Early(one.entry, len(one.sizes), self.words.take(), self.words.give_back)
        last = coming.get(len(waiting.keys) - 1)
        if last is not None:
            last.whole = True  # a step that computes only the end of it waits for all of it, before its first layer
        self._end(waiting)
        early = {place: one.early for place, one in coming.items() if one.early is not None}
        for place, one in coming.items():
            one.waiters.append(early[place].told)
        entries = [early[place].entry if place in early else waiting.held[place] for place in range(waiting.reach)]
        fetched = self.store.lend(waiting.session, entries, list(early.values()))
        self.store.index.unpin(entry for place, entry in waiting.held.items() if place >= waiting.reach)
        self.figures["lent_early"] += len(early)
        asyncio.get_running_loop().call_later(limit_s, _fail_late, list(early.values()))
        words = {place: one.word.offset for place, one in early.items()}
        waiting.answer(Found(fetched, waiting.counted(waiting.reach), waiting.why, self._took_s(waiting), words))

    def _doubtful(self, coming: Coming) -> bool:
        """Whether a chunk that is being read may well not come."""
        failed = coming.early is not None and coming.early.word.failed
        return failed or self._hopeless(coming)

    def _hopeless(self, coming: Coming) -> bool:
        """Whether a chunk is late, or its tier left alone: nobody waits for it any more."""
        return coming.entry in self.store.late or self.tiers[coming.tier].gate() is not Gate.CLOSED

    def _took_s(self, waiting: Waiting) -> float:
        return asyncio.get_running_loop().time() - waiting.began_s

    def _end(self, waiting: Waiting) -> None:
        waiting.over = True
        self._waiting.discard(waiting)
        waiting.session.promised_nbytes -= waiting.promised_nbytes
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _go(self, steps: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _fail_late(early: Sequence[Early]) -> None:
    """What has not come by now is not waited for any more; what has keeps its word."""
    for one in early:
        one.late()
