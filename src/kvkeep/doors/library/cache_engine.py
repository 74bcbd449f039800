"""`CacheEngine`: the door for engines in one process: store and retrieve whole chunks, at once or layer by layer.

Knows nothing about models, sockets or devices: `Copies` reach the engine's cache, a `Connection` the store. It changes
nothing of the process: no signal handlers, environment, logging settings or module state.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from kvkeep.config import Config
from kvkeep.core.identity import Identity, described, namespace
from kvkeep.core.key import Tokens, none_hash
from kvkeep.core.layout import ChunkLayout
from kvkeep.core.units import SUM_NBYTES
from kvkeep.doors.library.connection import Connection, Loan
from kvkeep.doors.library.digests import Extra, Prompts
from kvkeep.doors.library.span import Cut, Mask, Tables, cut
from kvkeep.engine.copies.copies import ChunkRotation, Copies, Copy, Fault, Gathering, Scattering
from kvkeep.engine.link import Link, StoreSource, hello_of
from kvkeep.memory.page_lock import PinCalls
from kvkeep.memory.pool import Lease
from kvkeep.telemetry import Figures, Miss
from kvkeep.transfer.rope.keys import Rotator
from kvkeep.transfer.transfer import Blocks
from kvkeep.wire.messages import NO_ROOM, Hello

START_LIMIT_S = 30.0

Flags = Mask | Sequence[bool] | None
Started = TypeVar("Started", Scattering, Gathering)


class CacheAccess(NamedTuple):
    """How an engine reaches its cache: what copies, what page-locks the pool for it (None: nothing needs to).

    `rotator` moves K to another position (None: nothing does); `clock` is in seconds.
    """

    copies: Copies
    pin_calls: PinCalls | None = None
    rotator: Rotator | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass
class Work:
    """The chunks of one request: each one's memory, its blocks, its digest, the sums to verify it by (b"": none).

    `indexes` are those of chunks to store, counted from chunk `first` of the request.
    """

    loan: Loan | None = None
    indexes: list[int] = field(default_factory=list)
    chunks: list[Lease] = field(default_factory=list)
    blocks: list[list[Blocks]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sums: list[bytes] = field(default_factory=list)
    first: int = 0


class CacheEngine:
    """Keeps the KV cache of prompts in the store of `source`, for the cache that `access` reaches.

    `tokens` are all of a request's tokens, `blocks` one block table a group from the first token on, `mask` false for
    what the engine has already and true from there on (None: true), `extra` what the bytes depend on besides the tokens
    (adapter, tenant's salt). ValueError for a mask with a hole and for tables that are too short; BlockError, a
    ValueError too, for a block that does not exist, is the null block 0, or is to be written twice.

    Any number of threads may call at the same time: calls to the store wait for each other, copies run side by side. No
    verb waits for the store longer than `config.deadline_s` a question; without an answer it is a miss. The copies of
    `access` end with the engine.
    """

    def __init__(self, access: CacheAccess, identity: Identity, source: StoreSource, config: Config) -> None:
        self.figures = Figures()
        self._copies = access.copies
        self._rotator = access.rotator
        self._shard = shard = access.copies.shard()
        self.layers = len(shard.ranges)
        """How many layers the layerwise verbs go through."""
        self._prompts = Prompts(shard.chunk_tokens, none_hash(identity.hash_seed))
        self._counting = threading.Lock()
        self._frozen = False
        self._bypassed = not config.enabled

        def hello(resumes: int) -> Hello:
            return hello_of(
                f"library {identity.model}",
                (namespace(identity), described(identity)),
                (ChunkLayout((shard,)), None),
                [os.getpid()],
                verify_every=config.verify_every,
                resumes=resumes,
            )

        link = Link(source, hello, [], access.clock)
        link.start(START_LIMIT_S)
        self._store = Connection(link, shard, config.deadline_s, access.pin_calls)

    # ---- bulk ------------------------------------------------------------------------------------------------------

    def store(self, tokens: Tokens, blocks: Tables, mask: Flags = None, extra: Extra | None = None) -> int:
        """Keeps every whole chunk whose tokens are all true in the mask; how many tokens have become readable."""
        work = self._room(self._cut(tokens, blocks, mask), tokens, extra)
        with self._giving_back(work), _ending(self._gather(work, layerwise=False)) as gathering:
            return self._commit(work, gathering)

    def retrieve(
        self, tokens: Tokens, blocks: Tables, mask: Flags = None, extra: Extra | None = None, at: int = 0
    ) -> Mask:
        """Fills the engine's blocks; the result is true exactly for the tokens that have arrived in every layer.

        They follow the mask's false part without a gap, and end with a chunk. Tokens that are false in the mask are not
        written; if they end inside a block of any group, that is a miss. `at` is the position at which the first token
        stands now: K moves there, as if the engine had computed these tokens there, and nothing before them. ValueError
        for a negative position, and for any but 0 where nothing says how K rotates.
        """
        span = self._cut(tokens, blocks, mask)
        self._check_position(at)
        work = self._found(span, tokens, extra)
        with self._giving_back(work), _ending(self._scatter(work, at, layerwise=False)) as scattering:
            return self._arrived(span, work, scattering)

    # ---- layerwise -------------------------------------------------------------------------------------------------

    def store_layer(
        self, tokens: Tokens, blocks: Tables, mask: Flags = None, extra: Extra | None = None
    ) -> Generator[None]:
        """As `store`, layer by layer: yields layers + 1 times, whatever happens.

        At the k-th step the engine must have computed the k-th layer; the last step makes the chunks readable.
        `transfer_mode` decides when a layer is copied, so the blocks must stay as they are until the last step. Closed
        before it, nothing is kept.
        """
        return self._storing(self._cut(tokens, blocks, mask), tokens, extra)

    def retrieve_layer(
        self, tokens: Tokens, blocks: Tables, mask: Flags = None, extra: Extra | None = None, at: int = 0
    ) -> Generator[int | Mask | None]:
        """As `retrieve`, layer by layer: yields layers + 2 times, whatever happens.

        First how many tokens are about to come; then, a layer a step, None once that layer has been written (on a
        device: for what is launched on the current stream from then on); last the mask, as `retrieve` returns it. Only
        the mask says which tokens have arrived in every layer.
        """
        self._check_position(at)
        return self._retrieving(self._cut(tokens, blocks, mask), tokens, extra, at)

    def _storing(self, span: Cut, tokens: Tokens, extra: Extra | None) -> Generator[None]:
        work = self._room(span, tokens, extra)
        with self._giving_back(work), _ending(self._gather(work, layerwise=True)) as gathering:
            for number in self._copies.order:
                gathering.save(number)
                yield
            self._commit(work, gathering)
        yield

    def _retrieving(self, span: Cut, tokens: Tokens, extra: Extra | None, at: int) -> Generator[int | Mask | None]:
        work = self._found(span, tokens, extra)
        with self._giving_back(work):
            coming = len(work.chunks)
            yield self._reach(span, work, coming) - span.start if coming else 0
            with _ending(self._scatter(work, at, layerwise=True)) as scattering:
                for number in self._copies.order:
                    scattering.wait(number)
                    yield None
                mask = self._arrived(span, work, scattering)
        yield mask

    # ---- control ---------------------------------------------------------------------------------------------------

    def lookup(self, tokens: Tokens, pin_id: str | None = None, extra: Extra | None = None) -> int:
        """How many tokens from the first one on could be retrieved now; with `pin_id` they stay until `unpin`.

        An id pins one prompt at a time. Pinned chunks count against `max_pinned_share` of the pool.
        """
        if self._bypassed:
            return 0
        hit = self._store.present(self._prompts.digests(tokens, extra), pin_id) * self._shard.chunk_tokens
        self._count(lookups=1, lookup_tokens=len(tokens))
        return hit

    def unpin(self, pin_id: str) -> None:
        """Lets what this id pinned be evicted again; an id that pins nothing is no error."""
        self._store.unpin(pin_id)

    def freeze(self, on: bool) -> None:
        """While it is on, hits are served and nothing new is stored."""
        self._frozen = on

    def bypass(self, on: bool) -> None:
        """While it is on, nothing is looked up and nothing is stored."""
        self._bypassed = on

    def clear(self) -> int:
        """Drops every chunk of this identity, in every tier, and every pin; how many chunks.

        Chunks that are just being stored are dropped as well. StoreGone if the store has not answered, TierUnavailable
        if a disk may give them again after a restart: the message says why, and what to do.
        """
        return self._store.clear()

    def store_figures(self) -> dict[str, int]:
        """The store's figures of its pool (bytes and counts by name); empty if it does not answer."""
        return self._store.figures()

    def close(self) -> None:
        """Ends the session and a private store; every verb after it is a miss. Idempotent."""
        self._copies.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- parts of the verbs ----------------------------------------------------------------------------------------

    def _cut(self, tokens: Tokens, blocks: Tables, mask: Flags) -> Cut:
        return cut(self._shard, len(tokens), blocks, mask)

    def _room(self, span: Cut, tokens: Tokens, extra: Extra | None) -> Work:
        """Reserves memory for the chunks to store that are absent; empty if there are none."""
        first = -(-span.start // span.shard.chunk_tokens)
        if self._frozen or self._bypassed or first >= span.chunks:
            return Work()
        digests = self._prompts.digests(tokens, extra)
        room = self._store.reserve(digests[first:])
        if room is None:
            return Work()
        work = Work(room.loan, list(room.chunks), list(room.chunks.values()), first=first)
        full = room.outcomes.count(NO_ROOM)
        self._count(skipped_full_chunks=full, skipped_present_chunks=len(room.outcomes) - full - len(work.indexes))
        work.blocks = span.blocks(first + index for index in work.indexes)
        self._check(work, unique=False)
        return work

    def _commit(self, work: Work, gathering: Gathering) -> int:
        """Makes the gathered chunks readable, unless storing was switched off meanwhile; how many tokens."""
        gathering.finish()
        sums = [part for _, part in sorted(gathering.end().items())]
        if work.loan is None or not sums or self._frozen or self._bypassed:
            return 0
        chunks = self._store.commit(work.loan, work.indexes, sums)
        stored = chunks * self._shard.chunk_tokens
        self._count(stored_chunks=chunks, stored_tokens=stored, dropped_chunks=len(sums) - chunks)
        return stored

    def _found(self, span: Cut, tokens: Tokens, extra: Extra | None) -> Work:
        """The chunks that can be retrieved, in the pool and pinned; empty on a miss."""
        first = span.start // span.shard.chunk_tokens
        if self._bypassed or not span.aligned or first >= span.chunks:
            if self._bypassed or not span.aligned:
                self._miss(Miss.BYPASS if self._bypassed else Miss.UNALIGNED)
            elif span.chunks:
                self._count(covered=1)
            else:
                self._miss(Miss.SHORT)
            return Work()
        digests = self._prompts.digests(tokens, extra)[first:]
        found = self._store.fetch(digests, first)
        if isinstance(found, Miss):
            self._miss(found)
            return Work()
        if len(found.chunks) < len(digests):
            self._miss(found.why or Miss.PARTLY_STORED)
        work = Work(found.loan, chunks=list(found.chunks), digests=digests, first=first)
        work.sums = [found.sums.get(index, b"") for index in range(len(work.chunks))]
        full = SUM_NBYTES * self.layers  # sums of another length hold for no layer
        work.sums = [sums if len(sums) in (0, full) else bytes(full) for sums in work.sums]
        work.blocks = span.blocks(range(first, first + len(work.chunks)))
        self._check(work, unique=True)
        return work

    @contextmanager
    def _giving_back(self, work: Work) -> Iterator[None]:
        """Gives the request's memory back at the end, whatever was raised."""
        try:
            yield
        finally:
            self._give_back(work)

    def _gather(self, work: Work, layerwise: bool) -> Gathering:
        pairs = zip(work.chunks, work.blocks, strict=True)
        return self._copies.gather([Copy(lease, blocks, seal=True, layerwise=layerwise) for lease, blocks in pairs])

    def _scatter(self, work: Work, at: int, layerwise: bool) -> Scattering:
        """Starts the copies of a retrieve, whose K moves to position `at`."""
        moves = self._rotator is not None and at and work.chunks
        text = self._rotator.for_text(work.blocks, work.first, at) if self._rotator is not None and moves else None
        copies = [
            Copy(
                lease,
                blocks,
                sums=sums,
                rotation=ChunkRotation(text, index) if text is not None else None,
                layerwise=layerwise,
                follows=index > 0,
            )
            for index, (lease, blocks, sums) in enumerate(zip(work.chunks, work.blocks, work.sums, strict=True))
        ]
        return self._copies.scatter(copies)

    def _check_position(self, at: int) -> None:
        if at < 0:
            raise ValueError(f"at: there is no position {at}")
        if at and self._rotator is None:
            raise ValueError(f"at: nothing says how K moves to position {at}: open the engine with `keys`")

    def _check(self, work: Work, unique: bool) -> None:
        """Checks all blocks of a request before anything is copied; gives its memory back if a block is wrong."""
        with ExitStack() as failing:
            failing.callback(self._give_back, work)
            self._copies.check([run for blocks in work.blocks for run in blocks], unique)
            failing.pop_all()

    def _reach(self, span: Cut, work: Work, arrived: int) -> int:
        """The token behind the last chunk that has arrived."""
        return (work.first + arrived) * span.shard.chunk_tokens

    def _arrived(self, span: Cut, work: Work, scattering: Scattering) -> Mask:
        """The mask of a retrieve. Drops the first chunk whose checksum failed, so that it is not given out again."""
        faults = scattering.end()
        arrived = min(faults, default=len(work.chunks))
        end = self._reach(span, work, arrived) if arrived else span.start
        failed = len(work.chunks) - arrived
        if work.loan is not None and faults.get(arrived) is Fault.DIFFERS:
            self._store.discard(work.loan, work.digests[arrived])
        self._count(delivered_tokens=end - span.start, failed_tokens=failed * span.shard.chunk_tokens)
        return span.mask(end)

    def _give_back(self, work: Work) -> None:
        loan, work.loan = work.loan, None
        if loan is not None:
            self._store.give_back(loan)

    def _count(self, **amounts: int) -> None:
        with self._counting:
            for name, amount in amounts.items():
                self.figures.add(name, amount)

    def _miss(self, why: Miss) -> None:
        with self._counting:
            self.figures.miss(why)


@contextmanager
def _ending(copies: Started) -> Iterator[Started]:
    """At the end none of these copies is under way, whatever was raised."""
    try:
        yield copies
    finally:
        copies.end()
