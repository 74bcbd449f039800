"""What planner and workers exchange every step: the plan goes down, reports come up.

Data only; an engine carries it and may serialise it. Offsets are those of whole chunks in the pool; a worker adds its
`shard_offsets[rank]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.transfer.transfer import Blocks


@dataclass(frozen=True, slots=True)
class LoadOp:
    """Scatter blocks of one chunk for a request, tokens from `start` on; with `sums` (one a rank) it is verified.

    `boot`: the start of the store whose pool `offset` is in. `written`: the step itself writes to one of its blocks, so
    all of them must be there before it. `state`: scatter the state at the claim's end, not a chunk. `progress_at`: a
    tier may still be reading the chunk, whose progress is at this byte of the pool's region (0: all of it is there).
    """

    boot: bytes
    request: str
    start: int
    offset: int
    _: KW_ONLY
    blocks: tuple[Blocks, ...]
    sums: tuple[bytes, ...] = ()
    written: bool = False
    state: bool = False
    progress_at: int = 0


class Trip(NamedTuple):
    """One request's loads beside the steps; they have a step number of their own, under which they are reported."""

    number: int
    loads: tuple[LoadOp, ...]


class StoreOp(NamedTuple):
    """Gather blocks into one chunk; `seal`: they are its last ones, so sum its ranges. `state`: gather a state."""

    offset: int
    blocks: tuple[Blocks, ...]
    seal: bool
    state: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One step's copies, the same for all ranks; `boot`: the start of the store whose pool the stores' offsets are in.

    `trips` start with the step and may go on after it; `idle`: the step computes nothing. `state_offsets` are to states
    what `shard_offsets` are to chunks. Where chunks are still being read, all loads together wait `wait_s` at most.
    """

    step: int = 0
    boot: bytes = b""
    shard_offsets: tuple[int, ...] = ()
    _: KW_ONLY
    loads: tuple[LoadOp, ...] = ()
    stores: tuple[StoreOp, ...] = ()
    trips: tuple[Trip, ...] = ()
    idle: bool = False
    state_offsets: tuple[int, ...] = ()
    wait_s: float = 0.0

    @property
    def loaded(self) -> set[str]:
        """The requests that the step loads for."""
        return {op.request for op in self.loads} | {trip.loads[0].request for trip in self.trips}

    def offset_of(self, op: LoadOp | StoreOp, rank: int) -> int:
        """The offset of a rank's part of the op's chunk, or state, in the pool."""
        return op.offset + (self.state_offsets if op.state else self.shard_offsets)[rank]


class LoadsDone(NamedTuple):
    """One rank has finished a step's loads; `failed` are the indexes, in the plan, of those that failed."""

    step: int
    rank: int
    failed: tuple[int, ...]


class StoresDone(NamedTuple):
    """One rank has finished a step's stores: the sums (b"" unless sealed) of each, by its index in the plan."""

    step: int
    rank: int
    sums: dict[int, bytes]


@dataclass
class Report:
    """What one or more ranks have finished since they last reported."""

    loads: list[LoadsDone] = field(default_factory=list)
    stores: list[StoresDone] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.loads or self.stores)

    def merged(self, other: Report) -> Report:
        """Both reports as one."""
        return Report(self.loads + other.loads, self.stores + other.stores)


@dataclass(frozen=True)
class RankInfo:
    """What a worker publishes before the planner exists: its rank, its process, its door, how its shard is arranged.

    `refusal` says why its cache cannot be kept (empty: it can); `facts` are the parts of the identity that only the
    worker knows. `states` arranges its part of a state (None: the model has none). `early`: its layerwise loads can
    wait for chunks that are still being read.
    """

    rank: int
    pid: int
    door: str
    shard: ShardLayout | None
    _: KW_ONLY
    facts: dict[str, str]
    refusal: str = ""
    states: ShardLayout | None = None
    early: bool = False


class Scheduled(NamedTuple):
    """One request of a step: once the step is done, the first `final` of its `tokens` are final and have their KV.

    The step computes tokens from `start` on. `states` lists the states that exist once it is done: how many tokens each
    is behind, and its block in each group of states.
    """

    request: str
    final: int
    tokens: Sequence[int]
    start: int = 0
    states: Sequence[tuple[int, tuple[int, ...]]] = ()
