"""Who holds what: a session is one planner's connection, its leases are the right to use memory until they are closed.

Data only. Knows nothing about sockets, processes or the index's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from kvkeep.core.index import IndexEntry
from kvkeep.core.units import SUM_NBYTES
from kvkeep.store.lent import Early


@dataclass(frozen=True)
class Opening:
    """What a planner says of itself when its session opens (in bytes; holders are pids).

    `sizes` are those of a chunk's ranges with their padding, in order; without them its chunks stay in the pool.
    `state_sizes` are those of a state's ranges; empty: there are no states. `owner` is the pid of the process at the
    other end as the kernel says it; 0: nobody knows.
    """

    name: str
    namespace: bytes
    identity: str
    chunk_nbytes: int
    _: KW_ONLY
    holders: tuple[int, ...] = ()
    verify_every: int = 0
    sizes: tuple[int, ...] = ()
    state_sizes: tuple[int, ...] = ()
    owner: int = 0

    @property
    def sums_nbytes(self) -> int:
        """The length of a chunk's sums; 0: nothing is known of its ranges."""
        return SUM_NBYTES * len(self.sizes)


@dataclass
class ReadLease:
    """Chunks that a planner may have read: pinned `entries`, and those that were lent before they had come."""

    entries: list[IndexEntry]
    early: Sequence[Early] = ()

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return sum(entry.nbytes for entry in self.entries) + sum(one.entry.nbytes for one in self.early)


@dataclass
class WriteLease:
    """Reserved chunks by their place in the reservation; an entry leaves when it is committed or given up.

    `alive_s` is when its writer last showed that it is at work: at the reservation, then at each commit.
    """

    entries: dict[int, IndexEntry]
    alive_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass
class Session:
    """One planner's connection and all its leases; `promised_nbytes` are what its waiting fetches may still pin.

    `client` is the same for all sessions of one process. `reserved_nbytes` are what its write leases hold.
    `states` holds what it keeps of states: these have sizes and a namespace of their own, and chunks' digests.
    `lasting`: somebody may find its keys again once it has left its namespace. `asked`: it has fetched or reserved.
    """

    number: int
    opening: Opening
    namespace: bytes
    client: int
    leases: dict[int, ReadLease | WriteLease] = field(default_factory=dict)
    reserved_nbytes: int = 0
    pinned_nbytes: int = 0
    promised_nbytes: int = 0
    fetched_chunks: int = 0
    states: Session | None = None
    lasting: bool = True
    asked: bool = False

    @property
    def sides(self) -> list[Session]:
        """Itself, and what it keeps of states."""
        return [self] if self.states is None else [self, self.states]

    def side_of(self, lease: int) -> Session:
        """The side that has this lease."""
        return next((side for side in self.sides if lease in side.leases), self)

    @property
    def held_nbytes(self) -> int:
        """Bytes of all its leases, read and write, states' too."""
        return sum(side.pinned_nbytes + side.reserved_nbytes for side in self.sides)
