"""A library's connection to its store: the mapped pool, and one client that several threads use one after the other.

A client has one owner and no lock, so a call to the store takes the connection's lock, at most for a deadline. Copies
are made without it. A store that is slow or gone is a miss, and is looked for again later. Knows nothing about tokens,
blocks or layers.
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
class Loan:
    """A lease of the store with its memory. Every user gives it back once; the last one ends it."""

    client: Client
    lease: StoreLease
    chunks: Sequence[Lease]
    uses: int = 1


class FoundChunks(NamedTuple):
    """A run of present chunks, the sums of those to verify by their index in it, why the run ends there."""

    loan: Loan
    chunks: Sequence[Lease]
    sums: Mapping[int, bytes]
    why: Miss | None = None


class Room(NamedTuple):
    """Memory for absent chunks by their index in the question; `outcomes` has the store's answer for each digest."""

    loan: Loan
    chunks: Mapping[int, Lease]
    outcomes: Sequence[int]


class Pin(NamedTuple):
    """A run that stays in the pool until it is unpinned."""

    digests: Sequence[bytes]
    found: FoundChunks


class Connection:
    """Over `link`, which has been started. A call waits at most `deadline_s` for the lock, and as long for the store.

    `pin_calls` page-lock the pool where a device copies by itself.
    """

    def __init__(self, link: Link, shard: ShardLayout, deadline_s: float, pin_calls: PinCalls | None = None) -> None:
        self._link = link
        self._mapped = MappedPool(pin_calls=pin_calls)
        self._shard = shard
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._pins: dict[str, Pin] = {}
        self._given_back: deque[Loan] = deque()
        self._loans = 0
        self._closed = False
        with self._client():
            """Maps the pool now: a descriptor that waited for the first call would keep a dead store's memory."""

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
            self.give_back(pin.found.loan)

    def fetch(self, digests: Sequence[bytes], first: int) -> FoundChunks | Miss:
        """The longest run of present chunks from the first digest on, which is the `first` chunk of its request.

        A run that is pinned in full is taken without asking the store.
        """
        with self._client() as client:
            if client is None:
                return Miss.DEADLINE if self._link.slow else Miss.STORE_GONE
            for pin in list(self._pins.values()):
                if pin.found.loan.client is client and pin.digests[first : first + len(digests)] == digests:
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
            answer = self._answer(client, lambda client: client.reserve(digests))
            if client is None or not isinstance(answer, Granted):
                return None
            indexes = [index for index, offset in enumerate(answer.offsets) if offset >= 0]
            loan = self._borrow(client, answer.lease, [answer.offsets[index] for index in indexes])
            return (
                Room(loan, dict(zip(indexes, loan.chunks, strict=True)), answer.offsets) if loan is not None else None
            )

    def commit(self, loan: Loan, indexes: Sequence[int], sums: Sequence[bytes]) -> int:
        """Makes written chunks readable, in as many messages as their sums need; how many have become readable."""
        done = 0
        with self._client() as client:
            for part in commit_parts(sums):
                if client is not loan.client:
                    break
                ask = partial(Client.commit, lease=loan.lease, indexes=indexes[part], sums=sums[part])
                answer = self._answer(client, ask)
                if not isinstance(answer, Committed):
                    break
                done += sum(answer.done)
        return done

    def give_back(self, loan: Loan) -> None:
        """One user less. Never waits, so that an object may call it when it ends, even within another call."""
        self._given_back.append(loan)
        if self._lock.acquire(blocking=False):
            self._leave()  # else whoever has the lock takes it back on leaving

    def discard(self, loan: Loan, digest: bytes) -> None:
        """Drops a chunk whose checksum failed, so that it is not given out again."""
        with self._client() as client:
            if client is not None and client is loan.client:
                client.discard([digest])

    def clear(self) -> int:
        """Drops every chunk of the namespace; how many.

        StoreGone if the store has not answered, TierUnavailable if they may be there again after a restart.
        """
        for pin_id in list(self._pins):
            self.unpin(pin_id)
        with self._client() as client:
            answer = self._answer(client, lambda client: client.clear())
            if not isinstance(answer, Cleared):
                raise StoreGone("the store did not answer within the deadline: nothing is known to be cleared")
            if answer.not_durable:
                raise TierUnavailable(f"{answer.count} chunks were dropped, and not for good: {answer.not_durable}")
            return answer.count

    def figures(self) -> dict[str, int]:
        """What the store says of its pool, by name; empty if it does not answer."""
        with self._client() as client:
            answer = self._answer(client, lambda client: client.stats())
            return answer.figures if isinstance(answer, Stats) else {}

    def close(self) -> None:
        """Ends the session and a store of our own; idempotent.

        Where memory is still in use, no goodbye is said, so that the store lends it to nobody before this process ends.
        """
        with self._lock:
            self._closed = True
            self._drop_pins(list(self._pins))
            if self._loans and self._link.client is not None:
                self._link.client.drop()
            self._link.close()
        self._mapped.close()  # what is still in use stays mapped

    @contextmanager
    def _client(self) -> Iterator[Client | None]:
        """Takes the lock; the client, if the store may be asked now."""
        if not self._lock.acquire(timeout=self._deadline_s):
            yield None
            return
        try:
            self._take_back()
            yield None if self._closed else self._live()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Frees the lock; takes back what was given back meanwhile, unless another call has the lock by then."""
        while True:
            self._take_back()
            self._lock.release()
            if not self._given_back or not self._lock.acquire(blocking=False):
                return

    def _take_back(self) -> None:
        while self._given_back:
            loan = self._given_back.popleft()
            loan.uses -= 1
            if loan.uses < 0:
                raise AssertionError("a lease was given back twice")
            if not loan.uses:
                self._loans -= 1
                for chunk in loan.chunks:
                    chunk.close()
                loan.client.release(loan.lease)

    def _drop_pins(self, pin_ids: Sequence[str]) -> None:
        for pin_id in pin_ids:
            pin = self._pins.pop(pin_id, None)
            if pin is not None:
                self._given_back.append(pin.found.loan)
        self._take_back()

    def _live(self) -> Client | None:
        """The client, its pool mapped. A session is resumed only while no memory is in use, since that frees all."""
        self._drop_pins([pin_id for pin_id, pin in self._pins.items() if not pin.found.loan.client.alive])
        client = self._link.live(idle=not self._loans)
        if client is not None and not self._mapped.has(client.welcome.boot):
            try:
                self._mapped.put(client.take_pool(), region_nbytes(client.welcome.pool_nbytes))
            except KVKeepError as error:
                client.lose(f"its pool cannot be used here: {error}")
                return None
        return client

    def _answer(self, client: Client | None, ask: Callable[[Client], Call]) -> Answer | None:
        """The store's answer within the deadline. A slow store is not asked again before it has caught up."""
        if client is None:
            return None
        call = ask(client)
        answer = client.wait(call, self._deadline_s)
        if not call.done:
            client.abandon(call)
            self._link.suspend()
        return answer

    def _fetched(self, client: Client | None, digests: Sequence[bytes]) -> Matched | None:
        answer = self._answer(client, lambda client: client.fetch(digests, self._deadline_s * STORE_SHARE))
        return answer if isinstance(answer, Matched) else None

    def _found(self, client: Client, answer: Matched) -> FoundChunks | None:
        loan = self._borrow(client, answer.lease, answer.offsets)
        return FoundChunks(loan, loan.chunks, answer.sums, _cut_by(answer.why)) if loan is not None else None

    def _part(self, found: FoundChunks, start: int, end: int) -> FoundChunks:
        """A part of a run for one more user of its lease."""
        found.loan.uses += 1
        sums = {index - start: part for index, part in found.sums.items() if start <= index < end}
        return FoundChunks(found.loan, found.chunks[start:end], sums)

    def _borrow(self, client: Client, lease: StoreLease, offsets: Sequence[int]) -> Loan | None:
        """The lease with its memory; None if the store has ended since it answered, and its pool is gone."""
        boot = client.welcome.boot
        chunks = [chunk for offset in offsets if (chunk := self._mapped.lease(boot, offset, self._shard)) is not None]
        if len(chunks) < len(offsets):
            for chunk in chunks:
                chunk.close()
            client.release(lease)
            return None
        self._loans += 1
        return Loan(client, lease, chunks)


def _cut_by(why: Miss | None) -> Miss | None:
    """Why a run is no longer; None where its next chunk was never stored."""
    return why if why is not Miss.NOT_STORED else None
