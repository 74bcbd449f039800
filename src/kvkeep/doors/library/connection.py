"""A library's line to its store: the pool mapped, and one client that several threads use in turn.

The client has one owner and no lock, so whoever talks to it holds this line's lock, at most for a deadline; copies are
made outside of it. A store that is slow or gone is a miss, and is found again later. Knows nothing about tokens, blocks
or layers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.link import Link
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.scheduler.lookups import STORE_SHARE
from kvkeep.errors import KVKeepError, StoreGone, TierUnavailable
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.pool import Lease
from kvkeep.memory.progress import region_nbytes
from kvkeep.telemetry import Miss
from kvkeep.wire.client import Answer, Call, Client
from kvkeep.wire.messages import Cleared, Committed, Granted, Matched, Stats, StoreLease, commit_parts


@dataclass(eq=False)
class Held:
    """A lease of the store and the memory that it lends. Every user gives it back once; the last one ends it."""

    client: Client
    lease: StoreLease
    chunks: Sequence[Lease]
    uses: int = 1


class FoundChunks(NamedTuple):
    """A run of present chunks, the sums of those that shall be verified by their place in it, why it is no longer."""

    held: Held
    chunks: Sequence[Lease]
    sums: Mapping[int, bytes]
    why: Miss | None = None


class Room(NamedTuple):
    """Memory for absent chunks by their place in the question; `outcomes` has the store's word on each digest."""

    held: Held
    chunks: Mapping[int, Lease]
    outcomes: Sequence[int]


class Pin(NamedTuple):
    """A run that is held until it is unpinned."""

    digests: Sequence[bytes]
    found: FoundChunks


class Connection:
    """Over `link`, which has been started; every call to the store waits at most `deadline_s`, and so does a turn.

    `pin_calls` page-lock the pool where a device copies by itself.
    """

    def __init__(self, link: Link, shard: ShardLayout, deadline_s: float, pin_calls: PinCalls | None = None) -> None:
        self._link = link
        self._mapped = MappedPool(pin_calls=pin_calls)
        self._shard = shard
        self._deadline_s = deadline_s
        self._turn = threading.Lock()
        self._pins: dict[str, Pin] = {}
        self._given_back: deque[Held] = deque()
        self._held = 0
        self._closed = False
        with self._client():
            """The pool is mapped now: a descriptor that waits for the first call keeps a dead store's memory."""

    def present(self, digests: Sequence[bytes], pin_id: str | None) -> int:
        """How many chunks are present from the first digest on; with `pin_id` they stay until it is unpinned."""
        if pin_id is not None:
            self.unpin(pin_id)
        with self._client() as client:
            answer = self._fetched(client, digests)
            if client is None or answer is None or not answer.lease:
                return 0
            if pin_id is None:
                client.release(answer.lease)
            elif (found := self._found(client, answer)) is not None:
                self._pins[pin_id] = Pin(digests[: len(answer.offsets)], found)
            else:
                return 0
            return len(answer.offsets)

    def unpin(self, pin_id: str) -> None:
        """What this id pinned may be evicted again; an id that pins nothing is no error. Never waits."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            self.give_back(pin.found.held)

    def fetch(self, digests: Sequence[bytes], first: int) -> FoundChunks | Miss:
        """The longest run of present chunks from the first digest on, which is the `first` chunk of its request.

        What is pinned in full is taken without asking.
        """
        with self._client() as client:
            if client is None:
                return Miss.DEADLINE if self._link.slow else Miss.STORE_GONE
            for pin in list(self._pins.values()):
                if pin.found.held.client is client and pin.digests[first : first + len(digests)] == digests:
                    return self._part(pin.found, first, first + len(digests))
            answer = self._fetched(client, digests)
            if answer is None:
                return Miss.DEADLINE if client.alive else Miss.STORE_GONE
            if not answer.lease:
                return answer.why or Miss.NOT_STORED
            return self._found(client, answer) or Miss.STORE_GONE

    def reserve(self, digests: Sequence[bytes]) -> Room | None:
        """Room for the chunks that are absent. None: no answer in time."""
        with self._client() as client:
            answer = self._answer(client, lambda one: one.reserve(digests))
            if client is None or not isinstance(answer, Granted):
                return None
            places = [place for place, offset in enumerate(answer.offsets) if offset >= 0]
            held = self._hold(client, answer.lease, [answer.offsets[place] for place in places])
            return Room(held, dict(zip(places, held.chunks, strict=True)), answer.offsets) if held is not None else None

    def commit(self, held: Held, places: Sequence[int], sums: Sequence[bytes]) -> int:
        """Makes written chunks readable, in as many messages as their sums need; how many of them are."""
        done = 0
        with self._client() as client:
            for part in commit_parts(sums):
                if client is not held.client:
                    break
                ask = partial(Client.commit, lease=held.lease, indexes=places[part], sums=sums[part])
                answer = self._answer(client, ask)
                if not isinstance(answer, Committed):
                    break
                done += sum(answer.done)
        return done

    def give_back(self, held: Held) -> None:
        """One user less. Never waits, so that it may be called wherever an object ends, even amid another call."""
        self._given_back.append(held)
        if self._turn.acquire(blocking=False):
            self._leave()  # else whoever has the turn takes it back on leaving

    def discard(self, held: Held, digest: bytes) -> None:
        """The chunk is not what was written: it is not given out again."""
        with self._client() as client:
            if client is not None and client is held.client:
                client.discard([digest])

    def clear(self) -> int:
        """Drops every chunk of the namespace; how many.

        StoreGone if the store has not said that it did, TierUnavailable if they may be there again after a restart.
        """
        for pin_id in list(self._pins):
            self.unpin(pin_id)
        with self._client() as client:
            answer = self._answer(client, lambda one: one.clear())
            if not isinstance(answer, Cleared):
                raise StoreGone("the store did not answer within the deadline: nothing is known to be cleared")
            if answer.not_durable:
                raise TierUnavailable(f"{answer.count} chunks were dropped, and not for good: {answer.not_durable}")
            return answer.count

    def figures(self) -> dict[str, int]:
        """What the store says of its pool, by name; empty if it does not answer."""
        with self._client() as client:
            answer = self._answer(client, lambda one: one.stats())
            return answer.figures if isinstance(answer, Stats) else {}

    def close(self) -> None:
        """Ends the session and a store of our own; idempotent.

        Where something is still in use, no goodbye is said: its memory is lent to nobody else before this process ends.
        """
        with self._turn:
            self._closed = True
            self._drop_pins(list(self._pins))
            if self._held and self._link.client is not None:
                self._link.client.drop()
            self._link.close()
        self._mapped.close()  # whoever still holds a part of it keeps it mapped

    @contextmanager
    def _client(self) -> Iterator[Client | None]:
        """The turn, and the client if the store may be asked now."""
        if not self._turn.acquire(timeout=self._deadline_s):
            yield None
            return
        try:
            self._take_back()
            yield None if self._closed else self._live()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Ends the turn; what was given back meanwhile is taken back by us, or by who has the turn by then."""
        while True:
            self._take_back()
            self._turn.release()
            if not self._given_back or not self._turn.acquire(blocking=False):
                return

    def _take_back(self) -> None:
        while self._given_back:
            held = self._given_back.popleft()
            held.uses -= 1
            if held.uses < 0:
                raise AssertionError("a lease was given back twice")
            if not held.uses:
                self._held -= 1
                for chunk in held.chunks:
                    chunk.close()
                held.client.release(held.lease)

    def _drop_pins(self, pin_ids: Sequence[str]) -> None:
        for pin_id in pin_ids:
            pin = self._pins.pop(pin_id, None)
            if pin is not None:
                self._given_back.append(pin.found.held)
        self._take_back()

    def _live(self) -> Client | None:
        """The client, its pool mapped. A session is resumed only while nothing is held: that frees what it lent."""
        self._drop_pins([pin_id for pin_id, pin in self._pins.items() if not pin.found.held.client.alive])
        client = self._link.live(idle=not self._held)
        if client is not None and not self._mapped.has(client.welcome.boot):
            try:
                self._mapped.put(client.take_pool(), region_nbytes(client.welcome.pool_nbytes))
            except KVKeepError as error:
                client.lose(f"its pool cannot be used here: {error}")
                return None
        return client

    def _answer(self, client: Client | None, ask: Callable[[Client], Call]) -> Answer | None:
        """What the store answers within the deadline; one that is slow is not asked again before it has caught up."""
        if client is None:
            return None
        call = ask(client)
        answer = client.wait(call, self._deadline_s)
        if not call.done:
            client.abandon(call)
            self._link.suspend()
        return answer

    def _fetched(self, client: Client | None, digests: Sequence[bytes]) -> Matched | None:
        answer = self._answer(client, lambda one: one.fetch(digests, self._deadline_s * STORE_SHARE))
        return answer if isinstance(answer, Matched) else None

    def _found(self, client: Client, answer: Matched) -> FoundChunks | None:
        held = self._hold(client, answer.lease, answer.offsets)
        return FoundChunks(held, held.chunks, answer.sums, _cut_by(answer.why)) if held is not None else None

    def _part(self, found: FoundChunks, start: int, end: int) -> FoundChunks:
        """A part of a run for one more user of its lease."""
        found.held.uses += 1
        sums = {place - start: one for place, one in found.sums.items() if start <= place < end}
        return FoundChunks(found.held, found.chunks[start:end], sums)

    def _hold(self, client: Client, lease: StoreLease, offsets: Sequence[int]) -> Held | None:
        """The lease with its memory; None if the store has ended since it answered, and its pool is gone."""
        boot = client.welcome.boot
        chunks = [chunk for offset in offsets if (chunk := self._mapped.lease(boot, offset, self._shard)) is not None]
        if len(chunks) < len(offsets):
            for chunk in chunks:
                chunk.close()
            client.release(lease)
            return None
        self._held += 1
        return Held(client, lease, chunks)


def _cut_by(why: Miss | None) -> Miss | None:
    """Why a run is no longer; None where its next chunk was never stored."""
    return why if why is not Miss.NOT_STORED else None
