"""Sessions and their leases: an engine's connection, and the memory of the pool that it may use.

Data only. Knows nothing about sockets, processes or the index's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.core.index import IndexEntry
from kvkeep.store.lent import Early
from kvkeep.store.openings import Opening


@dataclass
class ReadLease:
    """Chunks that an engine may read: pinned `entries`, and `early` those that are lent while they are still read."""

    entries: list[IndexEntry]
    early: Sequence[Early] = ()

    @property
    def nbytes(self) -> int:
        """The memory under it."""
        return sum(entry.nbytes for entry in self.entries) + sum(early.entry.nbytes for early in self.early)


@dataclass
class WriteLease:
    """Reserved chunks by their index in the reservation, without those that were committed.

    `alive_s` is when its writer was last seen at work: at the reservation, or at its last commit.
    """

    entries: dict[int, IndexEntry]
    alive_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """The memory under it."""
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass
class Session:
    """One engine's connection and its leases. `client` is the same for all sessions of one process.

    `reserved_nbytes` and `pinned_nbytes` are under its write and read leases; `promised_nbytes` are what its fetches
    under way may still pin. `states` is its side for states: they have sizes and a namespace of their own, and chunks'
    digests. `lasting`: others may find its keys once it has left its namespace. `asked`: it has fetched or reserved.
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
        """Its side for chunks (itself), and the one for states if it has any."""
        return [self] if self.states is None else [self, self.states]

    def side_of(self, lease: int) -> Session:
        """The side that has this lease."""
        return next((side for side in self.sides if lease in side.leases), self)

    @property
    def held_nbytes(self) -> int:
        """Bytes of all its leases, read and write, states' too."""
        return sum(side.pinned_nbytes + side.reserved_nbytes for side in self.sides)
