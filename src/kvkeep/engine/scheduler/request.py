"""What the planner remembers of a request, and the states it goes through.

Data and the table of moves. Knows nothing about the store's answers or the engine's calls; the planner makes the moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from kvkeep.core.key import Digests
from kvkeep.telemetry import Miss
from kvkeep.wire.client import Call
from kvkeep.wire.messages import HeldState


class State(Enum):
    """Where a request is between its first lookup and its end."""

    NEW = "new"
    ASKED = "asked"  # the store has been asked, no answer yet
    MATCHED = "matched"  # the answer is here and remembered; a lease holds its chunks
    ADMITTED = "admitted"  # the engine has allocated its blocks
    ENDED = "ended"


MOVES: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.ASKED, State.MATCHED, State.ADMITTED, State.ENDED}),
    State.ASKED: frozenset({State.ASKED, State.MATCHED, State.ADMITTED, State.ENDED}),
    State.MATCHED: frozenset({State.ASKED, State.MATCHED, State.ADMITTED, State.ENDED}),
    State.ADMITTED: frozenset(
        {State.ASKED, State.MATCHED, State.ADMITTED, State.ENDED}
    ),  # asked again: it was preempted
    State.ENDED: frozenset(),
}


class Match(NamedTuple):
    """The store's answer for a request: `hits` chunks from number `first` on, held by `lease` (0: nothing is held).

    `offsets` and `sums` (by place, where the store wants them verified) are theirs; `why` says why there is nothing;
    `sources` counts them by where they were. `state` is the one at their end, where the model has any.
    `words` are the places of those that were still being read, each with where its progress word is.
    """

    boot: bytes
    first: int
    lease: int
    offsets: tuple[int, ...]
    sums: dict[int, bytes]
    hits: int
    why: Miss | None = None
    sources: Mapping[str, int] = MappingProxyType({})
    state: HeldState | None = None
    words: Mapping[int, int] = MappingProxyType({})

    @property
    def leases(self) -> tuple[int, ...]:
        """All that is held."""
        return (self.lease, self.state.lease) if self.state is not None else (self.lease,)

    def tokens_by_source(self, tokens: int) -> dict[str, int]:
        """`tokens` that were claimed of it, split as its chunks are; exact in sum."""
        split = {source: tokens * count // self.hits for source, count in self.sources.items()}
        for source in list(split)[:1]:
            split[source] += tokens - sum(split.values())
        return {source: count for source, count in split.items() if count}


@dataclass
class OpenChunk:
    """A reserved chunk that is being filled.

    `next_places` has for each group the next place to gather; `sealed_in` is the step of its last gather (0: to come);
    `rewinds` counts how often it was filled from its start again. `state`: it is a state, and `number` its chunk's.
    """

    number: int
    lease: int
    place: int
    offset: int
    next_places: list[int]
    sealed_in: int = 0
    rewinds: int = 0
    state: bool = False


@dataclass(eq=False)
class Record:
    """Everything about one request.

    `keeps`: it may be looked up at all; `stores`: its chunks may be stored.
    `steps` counts the ops under way that name it. `claimed_from` are its claimed tokens by source. `why` is the reason
    of the miss that is counted at its admission; `short` says why its lookup was cut to `asked_chunks`. `limit_s` is
    what tiers were given; `hasty`: less than `deadline_s`, since computing is faster. `beside`: its load is beside the
    steps. `boot` is that of its write leases' store.
    """

    request: str
    chain: Digests
    prompt_tokens: int
    state: State = State.NEW
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
    claimed_from: dict[str, int] = field(default_factory=dict)
    reservation: Call | None = None
    reserved_at_s: float = 0.0
    wanted: list[int] = field(default_factory=list)
    reserved_to: int = 0
    open: dict[int, OpenChunk] = field(default_factory=dict)
    states: dict[int, OpenChunk] = field(default_factory=dict)
    write_leases: list[int] = field(default_factory=list)
    boot: bytes = b""
    steps: int = 0

    def move(self, to: State) -> None:
        """Goes to another state; a move that the table does not have is an assertion."""
        assert to in MOVES[self.state], f"request {self.request}: {self.state.value} -> {to.value}"
        self.state = to
