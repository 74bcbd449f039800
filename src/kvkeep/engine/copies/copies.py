"""What copies chunks between the pool and an engine's blocks: one interface for every door and every device.

A `Copy` is one chunk (or one recurrent state): its memory in the pool, its blocks in the engine, and what is special
about it. Knows nothing about plans, requests, keys or the store. The memory belongs to the caller, who may give it back
once `end` has returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvkeep.core.layout import ShardLayout
from kvkeep.memory.pool import Lease
from kvkeep.transfer.rope.keys import TextRotation
from kvkeep.transfer.transfer import Blocks


class Kind(Enum):
    """What is copied: a chunk of KV, or the state of a recurrent model, which lies in caches of other shapes."""

    CHUNK = "chunk"
    STATE = "state"


class Fault(Enum):
    """Why a scatter failed. DIFFERS: its checksum failed. LOST: only the copy was lost, the chunk is fine."""

    DIFFERS = "differs"
    LOST = "lost"


class ChunkRotation(NamedTuple):
    """Moves a chunk's K to another position: the rotation of its text, and which chunk of that text it is."""

    text: TextRotation
    chunk: int


class Copy(NamedTuple):
    """One chunk's memory and blocks.

    `sums`: a scatter verifies every range by them (b"": it does not). `seal`: a gather sums every range. `layerwise`:
    the copy may go layer by layer, if the mode says so too; else all of it is copied at once. `follows`: a scatter is
    of no use if the one before it in its list fails, so it fails as well.
    """

    memory: Lease
    blocks: Sequence[Blocks]
    kind: Kind = Kind.CHUNK
    sums: bytes = b""
    seal: bool = False
    rotation: ChunkRotation | None = None
    layerwise: bool = False
    follows: bool = False


class Scattering(Protocol):
    """Scatters under way, named by their index in the list of copies."""

    def wait(self, range_: int) -> None:
        """Range `range_` is in its blocks, or has failed, for whatever the caller does (on a device: launches) next."""

    def layers_ran(self) -> None:
        """Every layer has run: if any did so without `wait`, the layerwise copies fail, and later ones go in bulk."""

    @property
    def faults(self) -> Mapping[int, Fault]:
        """The scatters that are known to have failed so far."""

    def done(self, limit_s: float = 0.0) -> bool:
        """Whether nothing is written any more, waiting for that at most `limit_s`."""

    def end(self) -> Mapping[int, Fault]:
        """Waits until nothing is written any more; which scatters failed. May be called again."""


class Gathering(Protocol):
    """Gathers under way, named by their index in the list of copies."""

    def save(self, range_: int) -> None:
        """Range `range_` has been computed (on a device: launched). Computed in parts it comes again; the last counts.

        In bulk nothing is copied before `finish`.
        """

    def finish(self) -> None:
        """Every layer has been computed, or launched: copies whatever is left.

        On a CPU nothing is read any more when this returns; on a device, what is launched after `before_writes`
        writes only when all has been read.
        """

    def done(self, limit_s: float = 0.0) -> bool:
        """Whether nothing is read any more, waiting for that at most `limit_s`."""

    def end(self) -> dict[int, bytes]:
        """Waits until nothing is read any more; each copy's sums (b"" unless sealed). Empty if a copy was lost.

        May be called again, and instead of `finish`: then it is empty.
        """


class Copies(Protocol):
    """Copies of one rank; any thread may call.

    What raises in a copy raises in the caller if the caller makes it; a copy that dies on a thread has failed. `order`
    has the number of each layer's range in the order in which the engine computes its layers.
    """

    order: Sequence[int]

    def shard(self, kind: Kind = Kind.CHUNK) -> ShardLayout:
        """How the rank's part of a chunk, or of a state, is arranged. LayoutMismatch for what the model lacks."""

    def check(self, blocks: Sequence[Blocks], unique: bool, kind: Kind = Kind.CHUNK) -> None:
        """BlockError if a block does not exist, is the null block, or (with `unique`) is named twice.

        The caller checks all blocks of a plan or a request once, before it starts any copy.
        """

    def scatter(self, copies: Sequence[Copy], beside: bool = False, wait_s: float = 0.0) -> Scattering:
        """Starts to copy chunks into blocks. What is not copied layerwise is there for all that comes after this call.

        `beside`: no step waits for these; they are there once they are `done`. Where a chunk is still being read,
        all of them together wait for it at most `wait_s`.
        """

    def gather(self, copies: Sequence[Copy]) -> Gathering:
        """Prepares to copy blocks into chunks."""

    def before_writes(self) -> None:
        """The caller is about to launch what writes to blocks: it runs after the gathers that are under way."""

    def close(self) -> None:
        """No more copies will be started; those under way go on to their end."""


def fail(faults: dict[int, Fault], copies: Sequence[Copy], indexes: Iterable[int], fault: Fault) -> None:
    """Adds these scatters to `faults`, and those that follow them; the first fault of each counts."""
    for index in indexes:
        faults.setdefault(index, fault)
        for later in range(index + 1, len(copies)):
            if not copies[later].follows:
                break
            faults.setdefault(later, Fault.LOST)
