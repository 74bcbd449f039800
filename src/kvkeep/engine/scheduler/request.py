"""What the planner remembers of a request. Data only: the planner and its parts change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from kvkeep.core.key import Digests
from kvkeep.telemetry import Miss, Source
from kvkeep.wire.client import Call
from kvkeep.wire.messages import HeldState, StoreLease


@dataclass(frozen=True)
class Match:
    """The store's answer for a request: `hits` chunks from chunk `first` on, held by `lease`.

    `lease` names the start of the store also where it holds nothing. `offsets` and `sums` (by index, for the chunks
    that the worker shall verify) are theirs; `why` says why there are no more; `sources` counts them by where they
    were. `state` is the one at their end, where the model has any. `progress` maps the index of each chunk that was
    still being read to the offset of its progress word.
    """

    first: int
    lease: StoreLease
    _: KW_ONLY
    offsets: Sequence[int] = ()
    hits: int = 0
    sums: Mapping[int, bytes] = field(default_factory=dict)
    why: Miss | None = None
    sources: Mapping[Source, int] = field(default_factory=dict)
    state: HeldState | None = None
    progress: Mapping[int, int] = field(default_factory=dict)

    @property
    def leases(self) -> tuple[StoreLease, ...]:
        """All that is held."""
        return (self.lease, self.state.lease) if self.state is not None else (self.lease,)

    def tokens_by_source(self, tokens: int) -> dict[Source, int]:
        """`tokens` of it, divided among the sources as its chunks are; exact in sum."""
        split = {source: tokens * count // self.hits for source, count in self.sources.items()}
        for source in list(split)[:1]:
            split[source] += tokens - sum(split.values())
        return {source: count for source, count in split.items() if count}


@dataclass
class OpenChunk:
    """A reserved chunk that steps fill, or with `state` the state at the end of chunk `number`.

    `index` is that in its reservation. `next_slots` has for each group the next slot of the chunk to gather;
    `sealed_in` is the step of its last gather (0: to come); `rewinds` counts how often filling began again.
    """

    number: int
    lease: StoreLease
    index: int
    offset: int
    _: KW_ONLY
    next_slots: list[int] = field(default_factory=list)
    sealed_in: int = 0
    rewinds: int = 0
    state: bool = False


@dataclass(eq=False)
class RequestRecord:
    """Everything about one request.

    `keeps`: it may be looked up at all; `stores`: its chunks may be stored. `steps` counts the copies under way that
    name it; `ended`: the engine is done with it. `claimed_from` are its claimed tokens by source. `why` is the reason
    of the miss that is counted at its admission; `short` says why its lookup was cut to `asked_chunks`. `limit_s` is
    how long tiers may take; `hasty`: less than `deadline_s`, since computing is faster. `beside`: its load is beside
    the steps. `wanted` are the chunks of its open reservation, `write_leases` all of its reservations.
    """

    request: str
    chain: Digests
    prompt_tokens: int
    _: KW_ONLY
    keeps: bool = True
    stores: bool = True
    why: Miss | None = None
    short: Miss | None = None
    asked_chunks: int = 0
    computed: int = 0
    question: Call | None = None
    asked_first: int = 0
    asked_at_s: float = 0.0
    limit_s: float = 0.0
    hasty: bool = False
    beside: bool = False
    match: Match | None = None
    claimed_from: Mapping[Source, int] = field(default_factory=dict)
    reservation: Call | None = None
    reserved_at_s: float = 0.0
    wanted: list[int] = field(default_factory=list)
    reserved_to: int = 0
    open: dict[int, OpenChunk] = field(default_factory=dict)
    states: dict[int, OpenChunk] = field(default_factory=dict)
    write_leases: list[StoreLease] = field(default_factory=list)
    steps: int = 0
    ended: bool = False
