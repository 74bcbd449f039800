"""What an engine says of itself when its session opens, and what the store refuses.

Pure. Nothing that a client says is trusted: what cannot be right, or is more than a store takes, is a WireError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

from kvkeep.core.layout import padded_nbytes
from kvkeep.core.units import NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.errors import WireError

MAX_RANGES = 32 << 10  # of a chunk or a state: a record holds more, and the sums of four chunks fit an answer
MAX_UNSIZED_SUMS_NBYTES = 64 << 10  # of a chunk whose session did not say how many ranges it has


@dataclass(frozen=True)
class Opening:
    """What an engine says of itself; sizes in bytes.

    `sizes` are the padded sizes of a chunk's ranges, in order; chunks without them stay in the pool. `state_sizes` are
    those of a state's ranges; empty if the model has no states. `holders` are the pids of the processes that may touch
    its leases. `owner` is the pid of the connected process, from the kernel; 0 if it is not known.
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
        """The length of a chunk's sums; 0 if its ranges are not known."""
        return SUM_NBYTES * len(self.sizes)


def check_opening(opening: Opening) -> None:
    """WireError if what an engine says of itself cannot be right, or is more than a store takes."""
    check_namespace(opening.namespace)
    if opening.chunk_nbytes <= 0 or opening.verify_every < 0:
        raise WireError("chunk_nbytes must be positive and verify_every not negative")
    ranges = max(len(opening.sizes), len(opening.state_sizes))
    if ranges > MAX_RANGES:
        raise WireError(
            f"a chunk or state of {ranges} ranges is over the bound of {MAX_RANGES}: make the ranges larger"
        )
    if opening.sizes and (sum(opening.sizes) != opening.chunk_nbytes or not all(map(_is_padded, opening.sizes))):
        raise WireError("the sizes of a chunk's ranges must be padded and add up to chunk_nbytes")
    if not all(map(_is_padded, opening.state_sizes)):
        raise WireError("the sizes of a state's ranges must be padded")


def check_namespace(namespace: bytes) -> None:
    """WireError if it has another length."""
    if len(namespace) != NAMESPACE_NBYTES:
        raise WireError(f"a namespace has {NAMESPACE_NBYTES} bytes, not {len(namespace)}")


def check_sums(opening: Opening, sums: Sequence[bytes]) -> None:
    """WireError unless each of `sums` has a sum for each range: other sessions verify with them."""
    expected = opening.sums_nbytes
    for chunk_sums in sums:
        nbytes = len(chunk_sums)
        if expected and nbytes != expected:
            raise WireError(f"{nbytes} bytes of sums for {len(opening.sizes)} ranges: each has {SUM_NBYTES} bytes")
        if nbytes > MAX_UNSIZED_SUMS_NBYTES and not expected:
            raise WireError(f"{nbytes} bytes of sums for a chunk: at most {MAX_UNSIZED_SUMS_NBYTES} without its sizes")


def states_of(namespace: bytes) -> bytes:
    """The namespace of the states at the ends of a namespace's chunks."""
    return hashlib.sha256(b"kvkeep states" + namespace).digest()[:NAMESPACE_NBYTES]


def opening_of_states(opening: Opening) -> Opening:
    """The opening of a session's side that keeps its states."""
    sizes = opening.state_sizes
    return replace(opening, chunk_nbytes=sum(sizes), sizes=sizes, state_sizes=())


def _is_padded(nbytes: int) -> bool:
    return nbytes > 0 and padded_nbytes(nbytes) == nbytes
