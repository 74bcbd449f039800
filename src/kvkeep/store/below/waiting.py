"""A fetch that is not answered yet: what it holds, what it waits for, how far it can still reach, and its answer.

Knows nothing about tiers, or how a chunk gets into the pool.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from kvkeep.core.index import IndexEntry
from kvkeep.store.below.reads import TierReads
from kvkeep.store.sessions import Session
from kvkeep.store.store import Fetched, Why


class Found(NamedTuple):
    """What a fetch is answered with: the pinned run, where each chunk of it came from, and why it is no longer.

    `took_s` is how long the tiers were waited for. `words` are the places that are still being read, each with where
    its progress word is in the region.
    """

    fetched: Fetched
    sources: dict[str, int]
    why: Why | None
    took_s: float = 0.0
    words: Mapping[int, int] = MappingProxyType({})


class FetchLimits(NamedTuple):
    """How long a fetch waits, when a tier has failed (seconds), and whether it is answered before all is there."""

    deadline_s: float
    limit_s: float = 0.0
    early: bool = False


@dataclass(eq=False)
class Waiting:
    """A fetch that is not answered yet: its pinned entries by place, the places to come, the first that will not come.

    `asking` is the tier that was asked what it has and did not answer yet; it has failed if it takes `late_s` longer
    than the request waits.
    """

    session: Session
    keys: list[bytes]
    answer: Callable[[Found], None]
    promised_nbytes: int
    began_s: float
    late_s: float = 0.0
    held: dict[int, IndexEntry] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    reach: int = 0
    why: Why | None = None
    asking: TierReads | None = None
    early: bool = False
    located: bool = False
    over: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        """Whether everything up to its reach is here."""
        return self.located and not any(place < self.reach for place in self.pending)

    def counted(self, places: int) -> dict[str, int]:
        """Its first places by where they were."""
        return dict(Counter(self.sources[place] for place in range(places)))

    def cut(self, place: int, why: Why) -> None:
        """Nothing from `place` on will come."""
        if place < self.reach:
            self.reach, self.why = place, why
