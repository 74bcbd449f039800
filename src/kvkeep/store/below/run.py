"""A run: the chunks of one lookup from its first digest on, each pinned or on its way, and why there are no more.

A run gives back whatever it still has when it ends: `with Run(...) as run`. Knows nothing about tiers or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from kvkeep.core.index import IndexEntry
from kvkeep.store.below.promotions import Promotion
from kvkeep.store.sessions import Session
from kvkeep.store.store import Fetched, Store, is_shaped
from kvkeep.telemetry import Miss

POOL = "pool"


@dataclass(eq=False)
class Run:
    """What a lookup of `session` for `digests` has so far: `chunks` in order, and in `sources` where each was found.

    `why` says why the next chunk is missing. Meanwhile the session's share of the pool counts as many chunks as the
    run may pin; `lend` turns what is there into a lease.
    """

    store: Store
    session: Session
    digests: Sequence[bytes]
    chunks: list[IndexEntry | Promotion] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    why: Miss | None = None
    _promised_nbytes: int = 0

    def __post_init__(self) -> None:
        allowed = self.digests[: self.store.room(self.session)]
        self.keys = self.store.keys(self.session, allowed)
        self.why = None if len(allowed) == len(self.digests) else Miss.PINNED_SHARE
        self._shape = self.store.shape(self.session)

    def __enter__(self) -> Self:
        self._promised_nbytes = len(self.keys) * self.store.chunk_nbytes(self.session)
        self.session.promised_nbytes += self._promised_nbytes
        return self

    def __exit__(self, *_: object) -> None:
        self.session.promised_nbytes -= self._promised_nbytes
        self._drop(0)

    @property
    def missing(self) -> list[bytes]:
        """The keys of the chunks behind those that it has."""
        return self.keys[len(self.chunks) :]

    @property
    def coming(self) -> list[Promotion]:
        """Its chunks that are on their way."""
        return [chunk for chunk in self.chunks if isinstance(chunk, Promotion)]

    @property
    def progress(self) -> dict[int, int]:
        """The offset of the progress word of each chunk that is lent early, by the chunk's index."""
        chunks = enumerate(self.chunks)
        return {
            index: chunk.early.progress.offset
            for index, chunk in chunks
            if isinstance(chunk, Promotion) and chunk.early
        }

    def pin_present(self) -> None:
        """Pin the next chunks as far as the pool has them, and count them as used."""
        entries = self.store.pin(self.session, self.missing)
        self.chunks += entries
        self.sources += [POOL] * len(entries)

    def pin(self, key: bytes) -> bool:
        """Pin the next chunk; False if the pool does not have it, or in another shape."""
        entry = self.store.index.hold(key)
        if entry is None:
            return False
        if not is_shaped(entry, self._shape):
            self.store.index.unpin([entry])
            return False
        self.chunks.append(entry)
        self.sources.append(POOL)
        return True

    def join(self, promotion: Promotion, source: str, index: int | None = None) -> None:
        """The next chunk, or the one at `index`, is on its way from `source`."""
        index = len(self.chunks) if index is None else index
        promotion.waiting += 1
        self.chunks.insert(index, promotion)
        self.sources.insert(index, source)

    def arrive(self, index: int) -> None:
        """The chunk at `index` is readable, and pinned for this run."""
        self.chunks[index] = _entry(self.chunks[index])

    def cut(self, count: int, why: Miss) -> None:
        """Keep the first `count` chunks and give the others back."""
        self._drop(count)
        self.why = why

    def touch(self) -> None:
        """Count its chunks as used now, the first one last; cut the run where one was cleared meanwhile."""
        alive = self.store.index.touch([_entry(chunk) for chunk in self.chunks])
        if alive < len(self.chunks):
            self.cut(alive, Miss.NOT_STORED)

    def lend(self) -> Fetched:
        """A lease on its chunks, which takes over their pins; it holds early what is still on its way."""
        early = [chunk.early for chunk in self.coming if chunk.early is not None]
        fetched = self.store.lend(self.session, [_entry(chunk) for chunk in self.chunks], early)
        for promotion in self.coming:
            promotion.leave(self.store.index)
        self.chunks = []
        return fetched

    def _drop(self, count: int) -> None:
        dropped = self.chunks[count:]
        del self.chunks[count:], self.sources[count:]
        for chunk in dropped:
            if isinstance(chunk, Promotion):
                chunk.leave(self.store.index)
            else:
                self.store.index.unpin([chunk])


def _entry(chunk: IndexEntry | Promotion) -> IndexEntry:
    return chunk.entry if isinstance(chunk, Promotion) else chunk
