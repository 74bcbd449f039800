"""What planner and store say to each other.

Data only. Knows nothing about sockets or about what the store does. MessagePack by msgspec, each message a tagged
array. A request that has an answer carries a `call` number, which the answer repeats. Many digests travel as one piece
of bytes, 32 a digest. Numbers that come from a client (lease ids, indexes) are looked up by the store, never trusted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from kvkeep.core.units import DIGEST_NBYTES
from kvkeep.errors import WireError

VERSION = 7


class Hello(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """A session's first message: `namespace` and `chunk_nbytes` hold for all its keys.

    `holders` are the pids of all processes that may touch its leases, as the client sees them; with it come pidfds of
    them (SCM_RIGHTS), since the store may see other pids or none. `verify_every` says for every how many-th fetched
    chunk its sums are wanted (0: never). `resumes` is an ended session of the same process whose leases nobody uses.
    `sizes` are those of a chunk's ranges, padded, in order; without them its chunks are kept in the pool only. With
    `state_sizes`, those of a state's ranges, its prefixes are of use only up to a chunk at whose end there is a state.
    """

    version: int
    name: str
    namespace: bytes
    identity: str
    chunk_nbytes: int
    holders: list[int]
    verify_every: int = 0
    resumes: int = 0
    sizes: list[int] = []
    state_sizes: list[int] = []


class Welcome(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """The answer to Hello. `boot` is new at every start of the store.

    With it come two descriptors (SCM_RIGHTS): the pool's, and one that hangs up when the store has ended.
    """

    version: int
    boot: bytes
    session: int
    pid: int
    pool_nbytes: int


class Fetch(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """Pin the longest run of present chunks from the first digest on, brought from tiers for at most `deadline_s`.

    A tier that takes longer than `limit_s` (at least `deadline_s`) is taken for one that has failed. `early`: the
    answer may cover chunks that are still being read, for at most `limit_s` more.
    """

    call: int
    digests: bytes
    deadline_s: float = 0.0
    limit_s: float = 0.0
    early: bool = False


class HeldState(NamedTuple):
    """The state at the end of a run of chunks, held by a lease of its own; `sums` if the worker shall verify it."""

    lease: int
    offset: int
    sums: bytes
    source: str


class Matched(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """The run that Fetch found: an offset in the pool for each chunk, held by `lease` (0: no chunk, no lease).

    `sums` maps a place in the run to that chunk's sums, for the chunks that the worker shall verify. `sources` counts
    its chunks by where they were; `why` says why the run is no longer ("" if it is all that was asked for). `took_s` is
    how long the tiers were waited for. In a session that has states the run ends where `state` is. `words` are the
    places of chunks still being read, each with where its word is in the pool's region (`kvkeep.memory.progress`).
    `used_nbytes` and `pinned_nbytes` are of the pool, as in Committed.
    """

    call: int
    lease: int
    offsets: list[int]
    sums: dict[int, bytes]
    sources: dict[str, int] = {}
    why: str = ""
    took_s: float = 0.0
    state: HeldState | None = None
    words: dict[int, int] = {}
    used_nbytes: int = 0
    pinned_nbytes: int = 0


class Reserve(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """Ask for room to write these chunks or, with `states`, the states at their ends."""

    call: int
    digests: bytes
    states: bool = False


class Granted(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """The answer to Reserve: for each digest an offset in the pool, or PRESENT, BUSY, NO_ROOM."""

    call: int
    lease: int
    offsets: list[int]


PRESENT = -1  # the store has it already
BUSY = -2  # another lease is writing it
NO_ROOM = -3  # the pool has no room for it


class Commit(msgspec.Struct, frozen=True, tag=7, array_like=True):
    """All shards of these chunks of a Reserve (`places` in it) are written; `sums` one a chunk, shards in order."""

    call: int
    lease: int
    places: list[int]
    sums: list[bytes]


class Committed(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """The answer to Commit: whether each chunk is readable now, and what the pool holds (bytes)."""

    call: int
    done: list[bool]
    used_nbytes: int
    pinned_nbytes: int


class Release(msgspec.Struct, frozen=True, tag=9, array_like=True):
    """A lease ends: what it pinned is unpinned, what it reserved and did not commit is given up. No answer."""

    lease: int


class Discard(msgspec.Struct, frozen=True, tag=10, array_like=True):
    """These chunks, and the states at their ends, are not to be given out again. No answer."""

    digests: bytes


class Clear(msgspec.Struct, frozen=True, tag=11, array_like=True):
    """Drop every chunk of the session's namespace, or of all."""

    call: int
    everything: bool = False


class Cleared(msgspec.Struct, frozen=True, tag=12, array_like=True):
    """The answer to Clear: how many chunks lost their keys.

    `not_durable` says why chunks in a tier below the pool may be there again after a restart; "": they are gone.
    """

    call: int
    count: int
    not_durable: str = ""


class Rename(msgspec.Struct, frozen=True, tag=13, array_like=True):
    """From here on the session's keys are in another namespace. No answer.

    `lasting` says whether anybody can find them again once the session has left it.
    """

    namespace: bytes
    identity: str
    lasting: bool = True


class AskStats(msgspec.Struct, frozen=True, tag=14, array_like=True):
    """Ask what the store holds; with `check` it first proves that its index adds up."""

    call: int
    check: bool = False


class Known(msgspec.Struct, frozen=True, array_like=True):
    """A namespace: who named it last, what it is (for people), how many chunks of it are in the pool."""

    namespace: bytes
    name: str
    identity: str
    chunks: int


class Stats(msgspec.Struct, frozen=True, tag=15, array_like=True):
    """The store's figures by name, and the tiers that are `out`: configured and not there, each with the reason.

    If the check was asked for, `problem` has what it found, `known` the namespaces.
    """

    call: int
    figures: dict[str, int]
    problem: str = ""
    known: list[Known] = []
    out: dict[str, str] = {}


class Bye(msgspec.Struct, frozen=True, tag=16, array_like=True):
    """The session ends and none of its processes touches a lease any more."""


class Refused(msgspec.Struct, frozen=True, tag=17, array_like=True):
    """The store ends the session, with the error's code and text."""

    code: str
    text: str


ToStore = Hello | Fetch | Reserve | Commit | Release | Discard | Clear | Rename | AskStats | Bye
FromStore = Welcome | Matched | Granted | Committed | Cleared | Stats | Refused

_encoder = msgspec.msgpack.Encoder()
_to_store: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToStore)
_from_store: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromStore)


def encoded(message: ToStore | FromStore) -> bytes:
    """The message as MessagePack."""
    return _encoder.encode(message)


def decoded_by_store(payload: bytes) -> ToStore:
    """The message in `payload`; WireError if it is none that a client may send."""
    try:
        message: ToStore = _to_store.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    return message


def decoded_by_client(payload: bytes) -> FromStore:
    """The message in `payload`; WireError if it is none that a store sends."""
    try:
        message: FromStore = _from_store.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    return message


def split_digests(digests: bytes) -> list[bytes]:
    """The digests in one piece of bytes; WireError if it is not a whole number of them."""
    if len(digests) % DIGEST_NBYTES:
        raise WireError(f"{len(digests)} bytes are not a whole number of digests")
    return [digests[i : i + DIGEST_NBYTES] for i in range(0, len(digests), DIGEST_NBYTES)]
