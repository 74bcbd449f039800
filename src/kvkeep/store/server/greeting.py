"""A client's first message: what it must say to be let in, and what its session is from then on.

Hello opens an engine's session, which gets the pool. Control opens that of a tool, which gets none of it and may ask
only what is in `ASKS_OF_CONTROL`. A client of another version is refused with both versions. Knows nothing about
sockets.
"""

from __future__ import annotations

from kvkeep.errors import WireError
from kvkeep.store.openings import Opening
from kvkeep.wire import messages as m
from kvkeep.wire.processes import MAX_HOLDERS

MAX_PID = 2**22  # the kernel's own limit
ASKS_OF_CONTROL = (m.AskStats, m.Bye)


def first_message(payload: bytes) -> m.Hello | m.Control:
    """The message that opens a session; WireError for another one, and for one of another version."""
    version = m.version_in(payload)
    try:
        message = m.decoded_by_store(payload)
    except WireError:
        _check_version(version)
        raise
    if not isinstance(message, m.Hello | m.Control):
        raise WireError("the first message must be a hello")
    _check_version(message.version)
    return message


def opening_of(hello: m.Hello, owner: int) -> Opening:
    """What an engine says of itself; WireError for holders that cannot be. `owner` is the pid at the other end."""
    if len(hello.holders) > MAX_HOLDERS:
        raise WireError(f"a session names at most {MAX_HOLDERS} processes")
    if not all(0 < pid <= MAX_PID for pid in hello.holders):
        raise WireError("a holder is no process id")
    return Opening(
        hello.name,
        hello.namespace,
        hello.identity,
        hello.chunk_nbytes,
        holders=tuple(hello.holders),
        verify_every=hello.verify_every,
        sizes=tuple(hello.sizes),
        state_sizes=tuple(hello.state_sizes),
        owner=owner,
    )


def check_open(message: m.ToStore, control: bool) -> None:
    """WireError for what an open session may not send: a hello and, with its name, what is not for a tool."""
    if isinstance(message, m.Hello | m.Control):
        raise WireError("a session says hello once")
    if control and not isinstance(message, ASKS_OF_CONTROL):
        raise WireError(f"a control session may not send {type(message).__name__}: it uses no memory of the store")


def _check_version(version: int | None) -> None:
    if version is not None and version != m.VERSION:
        raise WireError(f"protocol version {version} is not {m.VERSION}: use the same kvkeep on both sides")
