"""What an engine's planner, or a control session, and the store say to each other.

Data only: knows nothing about sockets or about what the store does. Each message is MessagePack (msgspec), a tagged
array. A request that has an answer carries a `call` number, which the answer repeats. Digests travel as one
piece of bytes, 32 bytes a digest. The store looks up every number that comes from a client (a lease's, an index), and
trusts none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from kvkeep.core.units import DIGEST_NBYTES
from kvkeep.errors import WireError
from kvkeep.telemetry import SOURCE_PATTERN, Figure, Miss, by_flat_name

VERSION = 8
COMMIT_NBYTES = 1 << 20  # of sums in one Commit: well under a frame's bound
SourceName = Annotated[str, msgspec.Meta(pattern=SOURCE_PATTERN)]


class Hello(msgspec.Struct, frozen=True, tag=1, array_like=True, kw_only=True):
    """An engine's first message: `namespace` and `chunk_nbytes` hold for all keys of its session.

    `holders` are the pids of all processes that may touch its leases, as the client sees them. Their pidfds come with
    it (SCM_RIGHTS), since the store may see other pids or none. `verify_every`: send the sums of every n-th fetched
    chunk, so that the worker verifies it (0: of none). `resumes` is an ended session of the same process whose leases
    nobody uses. `sizes` are the padded sizes of a chunk's ranges, in order; without them its chunks stay in the pool
    only. With `state_sizes`, those of a state's ranges, a prefix is of use only up to a chunk with a state at its end.
    """

    version: int = VERSION
    name: str
    namespace: bytes
    identity: str
    chunk_nbytes: int
    holders: Sequence[int]
    verify_every: int = 0
    resumes: int = 0
    sizes: Sequence[int] = ()
    state_sizes: Sequence[int] = ()


class Control(msgspec.Struct, frozen=True, tag=18, array_like=True, kw_only=True):
    """The first message of a tool such as `kvkeep stats`, which asks about the store and uses none of its memory.

    Such a session has no namespace, no lease and no share of the pool, and gets no descriptor.
    """

    version: int = VERSION
    name: str


class StoreLease(NamedTuple):
    """The right to use memory that a store has lent: which start of the store (`boot`), and the lease's number there.

    Falsy for no lease.
    """

    boot: bytes
    number: int

    def __bool__(self) -> bool:
        return self.number != 0


NO_LEASE = StoreLease(b"", 0)


class Welcome(msgspec.Struct, frozen=True, tag=2, array_like=True, kw_only=True):
    """The answer to Hello, and to Control. `boot` is new at every start of the store.

    An engine's comes with two descriptors (SCM_RIGHTS): the pool's, and one that hangs up when the store has ended. A
    control session's comes without, and its `session` is 0.
    """

    version: int = VERSION
    boot: bytes
    session: int
    pid: int
    pool_nbytes: int


class Fetch(msgspec.Struct, frozen=True, tag=3, array_like=True, kw_only=True):
    """Pin the longest run of present chunks from the first digest on, brought from tiers for at most `deadline_s`.

    A tier that takes longer than `limit_s` (at least `deadline_s`) counts as failed. `early`: the answer may cover
    chunks that are still being read, for at most `limit_s` more.
    """

    call: int
    digests: bytes
    deadline_s: float = 0.0
    limit_s: float = 0.0
    early: bool = False


class HeldState(NamedTuple):
    """The state at the end of a run of chunks, under a lease of its own; `sums` if the worker shall verify it."""

    lease: StoreLease
    offset: int
    sums: bytes
    source: SourceName


class Matched(msgspec.Struct, frozen=True, tag=4, array_like=True, kw_only=True):
    """The run that Fetch found: an offset in the pool for each chunk, held by `lease` (falsy where there is no chunk).

    `sums` maps a chunk's index in the run to its sums, for the chunks that the worker shall verify. `sources` counts
    the chunks by where they were; `why` says why the run is no longer (None: it is all that was asked for). `took_s` is
    how long the tiers were waited for. In a session that has states the run ends where `state` is. `progress` maps the
    index of each chunk that is still being read to the offset of its progress word in the pool's region
    (`kvkeep.memory.progress`). `used_nbytes` and `pinned_nbytes` are of the pool, as in Committed.
    """

    call: int
    lease: StoreLease = NO_LEASE
    offsets: Sequence[int] = ()
    sums: dict[int, bytes] = {}
    sources: dict[SourceName, int] = {}
    why: Miss | None = None
    took_s: float = 0.0
    state: HeldState | None = None
    progress: dict[int, int] = {}
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
    lease: StoreLease
    offsets: list[int]


PRESENT = -1  # the store has it already
BUSY = -2  # another lease is writing it
NO_ROOM = -3  # the pool has no room for it


class Commit(msgspec.Struct, frozen=True, tag=7, array_like=True):
    """All shards of these chunks are written: `indexes` in their Reserve, and each chunk's sums, shards in order."""

    call: int
    lease: int
    indexes: Sequence[int]
    sums: Sequence[bytes]


class Committed(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """The answer to Commit: whether each chunk is readable now, and what the pool holds (bytes)."""

    call: int
    done: list[bool]
    used_nbytes: int
    pinned_nbytes: int


class Release(msgspec.Struct, frozen=True, tag=9, array_like=True):
    """End a lease: unpin its chunks, give up those that it reserved and did not commit. No answer."""

    lease: int


class Discard(msgspec.Struct, frozen=True, tag=10, array_like=True):
    """Give these chunks, and the states at their ends, to nobody any more. No answer."""

    digests: bytes


class Clear(msgspec.Struct, frozen=True, tag=11, array_like=True):
    """Drop every chunk of the session's namespace, or of all namespaces."""

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
    """Put the session's keys into another namespace from here on. No answer.

    `lasting`: others may find these keys after the session has left the namespace.
    """

    namespace: bytes
    identity: str
    lasting: bool = True


class AskStats(msgspec.Struct, frozen=True, tag=14, array_like=True):
    """Ask for the store's figures; with `check` the store first proves that its index adds up."""

    call: int
    check: bool = False


class Known(msgspec.Struct, frozen=True, array_like=True):
    """A namespace: who named it last, what it is (for people), how many chunks of it are in the pool."""

    namespace: bytes
    name: str
    identity: str
    chunks: int


class Stats(msgspec.Struct, frozen=True, tag=15, array_like=True, kw_only=True):
    """The store's figures, and the tiers that are `out`: configured but not there, each with the reason.

    If the check was asked for, `problem` has what it found, `known` the namespaces.
    """

    call: int
    rows: Sequence[Figure]
    problem: str = ""
    known: Sequence[Known] = ()
    out: dict[str, str] = {}

    @property
    def figures(self) -> dict[str, int]:
        """The figures by name; those of a tier as TIER_NAME."""
        return by_flat_name(self.rows)


class Bye(msgspec.Struct, frozen=True, tag=16, array_like=True):
    """The session ends and none of its processes touches a lease any more."""


class Refused(msgspec.Struct, frozen=True, tag=17, array_like=True):
    """The store ends the session, with the error's code and text. Of the same form in every version."""

    code: str
    text: str


ToStore = Hello | Control | Fetch | Reserve | Commit | Release | Discard | Clear | Rename | AskStats | Bye
FromStore = Welcome | Matched | Granted | Committed | Cleared | Stats | Refused


class _Start(msgspec.Struct, array_like=True):
    """How any first message begins, in every version; what follows is skipped, and not made into objects."""

    tag: int
    version: int


_FIRST_TAGS = (Hello.__struct_config__.tag, Control.__struct_config__.tag)
_encoder = msgspec.msgpack.Encoder()
_to_store: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToStore)
_from_store: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromStore)
_start: msgspec.msgpack.Decoder[_Start] = msgspec.msgpack.Decoder(_Start)


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


def version_in(payload: bytes) -> int | None:
    """The version in a first message, whatever else that version of it has; None in any other message."""
    try:
        start = _start.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return start.version if start.tag in _FIRST_TAGS else None


def commit_parts(sums: Sequence[bytes]) -> Iterator[slice]:
    """How chunks with these sums are divided among messages, so that each Commit fits a frame."""
    step = max(1, COMMIT_NBYTES // max(map(len, sums), default=1))
    return (slice(start, start + step) for start in range(0, len(sums), step))


def split_digests(digests: bytes) -> list[bytes]:
    """The digests in one piece of bytes; WireError if it is not a whole number of them."""
    if len(digests) % DIGEST_NBYTES:
        raise WireError(f"{len(digests)} bytes are not a whole number of digests")
    return [digests[i : i + DIGEST_NBYTES] for i in range(0, len(digests), DIGEST_NBYTES)]
