"""What planner and workers exchange every step: the plan down, the reports up.

Data only. Knows nothing about how an engine carries it. Offsets are those of whole chunks in the pool; a worker adds
`shard_offsets[rank]`. Everything here survives the engine's own serialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.layout import ShardLayout
from kvkeep.transfer.transfer import Blocks


class LoadOp(NamedTuple):
    """Scatter blocks of one chunk for a request, tokens from `start` on; with `sums` (one a rank) it is verified.

    `boot` says for which start of the store `offset` holds; `written`: the step itself writes to one of its blocks, so
    that all of them must be there before it. `state`: not a chunk is scattered but the state at the claim's end.
    `word`: the chunk may still be being read, and where its progress word is in the pool's region (0: it is all there).
    """

    boot: bytes
    request: str
    start: int
    offset: int
    blocks: tuple[Blocks, ...]
    sums: tuple[bytes, ...] = ()
    written: bool = False
    state: bool = False
    word: int = 0


class Trip(NamedTuple):
    """One request's loads beside the steps, reported under a number of their own."""

    number: int
    loads: tuple[LoadOp, ...]


class StoreOp(NamedTuple):
    """Gather blocks into one chunk; with `seal` they are its last ones and its ranges are summed.

    `state`: what is gathered is a state, whole.
    """

    offset: int
    blocks: tuple[Blocks, ...]
    seal: bool
    state: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One step's copies, the same for all ranks; `boot` says for which start of the store the stores' offsets hold.

    `trips` start with the step and end when they end; `idle`: the step computes nothing. `state_offsets` are to states
    what `shard_offsets` are to chunks. For what is still being read all its loads together wait `wait_s` at most.
    """

    step: int = 0
    boot: bytes = b""
    shard_offsets: tuple[int, ...] = ()
    loads: tuple[LoadOp, ...] = ()
    stores: tuple[StoreOp, ...] = ()
    trips: tuple[Trip, ...] = ()
    idle: bool = False
    state_offsets: tuple[int, ...] = ()
    wait_s: float = 0.0

    @property
    def loaded(self) -> set[str]:
        """The requests that it loads for."""
        return {op.request for op in self.loads} | {trip.loads[0].request for trip in self.trips}

    def offset_of(self, op: LoadOp | StoreOp, rank: int) -> int:
        """Where a rank's part of what the op copies is in the pool."""
        return op.offset + (self.state_offsets if op.state else self.shard_offsets)[rank]


class LoadsDone(NamedTuple):
    """One rank has finished a step's loads; `failed` are the places of those that failed in the plan."""

    step: int
    rank: int
    failed: tuple[int, ...]


class StoresDone(NamedTuple):
    """One rank has finished a step's stores: sums (empty if not sealed) by place in the plan, if done."""

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
    """What a worker publishes before the planner exists: who it is, where it takes the pool, how its shard is arranged.

    `refusal` says why its cache cannot be kept (empty: it can); `facts` are the parts of the identity that only the
    worker knows. `states` arranges its part of a state (None: the model has none). `early`: by
    layer its copies wait for what is still being read.
    """

    rank: int
    pid: int
    door: str
    shard: ShardLayout | None
    facts: dict[str, str]
    refusal: str = ""
    states: ShardLayout | None = None
    early: bool = False


class Scheduled(NamedTuple):
    """One request of a step: how many of its `tokens` are final and have their KV once the step is done.

    The step computes them from `start` on. `states` are those that are there when it is done: tokens, then the block of
    each group of states.
    """

    request: str
    final: int
    tokens: Sequence[int]
    start: int = 0
    states: Sequence[tuple[int, tuple[int, ...]]] = ()
