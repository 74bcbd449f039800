"""Which epoch each namespace is in: a record of any other epoch is never given back.

Values and their file format only. A clear raises an epoch, and makes that durable, before anything is deleted: a record
that comes back after a crash carries an old epoch.
"""

from __future__ import annotations

import msgspec
import xxhash

from kvkeep.errors import CorruptChunk

VERSION = 2  # that of the records: those beside epochs of another version are of another format
_MAX_NAMESPACES = 4096
EVERYTHING = "*"
_SUM_LINE_NBYTES = len("\n") + 32 + len("\n")


class Epochs(msgspec.Struct, frozen=True):
    """The epoch of everything, that of each namespace cleared since, and what may still lie about from before.

    Epochs only rise: each is one more than the last, or the clock where that is later, so that they rise also where
    the file was lost. Namespaces are in hex; `unsettled` names those whose old records may not all be deleted yet.
    """

    last: int
    everything: int
    namespaces: dict[str, int] = {}
    unsettled: frozenset[str] = frozenset()
    version: int = VERSION

    def of(self, namespace: bytes) -> int:
        """The epoch that a record of this namespace must carry."""
        return self.namespaces.get(namespace.hex(), self.everything) if self.namespaces else self.everything

    def raised(self, namespace: bytes | None, now_ns: int) -> Epochs:
        """The epochs after a clear; past 4,096 cleared namespaces everything is cleared instead."""
        last = max(self.last + 1, now_ns)
        if namespace is None or len(self.namespaces) >= _MAX_NAMESPACES:
            return Epochs(last, last, {}, frozenset([EVERYTHING]))
        name = namespace.hex()
        return Epochs(last, self.everything, {**self.namespaces, name: last}, self.unsettled | {name})

    def settled(self) -> Epochs:
        """The epochs once no old record lies about."""
        return msgspec.structs.replace(self, unsettled=frozenset())

    def is_unsettled(self, namespace: bytes) -> bool:
        """Whether records of older epochs may lie about in this namespace."""
        return bool(self.unsettled) and (EVERYTHING in self.unsettled or namespace.hex() in self.unsettled)


def first_epochs(now_ns: int) -> Epochs:
    """Where nothing is known: whatever is there already is of an older epoch."""
    return Epochs(now_ns, now_ns, {}, frozenset([EVERYTHING]))


def encode_epochs(epochs: Epochs, nbytes: int = 0) -> bytes:
    """One line of JSON, filled up with spaces so that all are `nbytes` if they are fewer, then its xxh3-128 in hex."""
    line = msgspec.json.encode(epochs, order="deterministic").ljust(nbytes - _SUM_LINE_NBYTES)
    return line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"


def decode_epochs(octets: bytes) -> Epochs:
    """Read what `encode_epochs` wrote, now or in an earlier version; CorruptChunk for anything else."""
    line, _, rest = octets.partition(b"\n")
    if rest != xxhash.xxh3_128_hexdigest(line).encode() + b"\n":
        raise CorruptChunk("the checksum of the epochs does not hold")
    try:
        epochs = msgspec.json.decode(line, type=Epochs)
    except msgspec.MsgspecError as error:
        raise CorruptChunk(f"the epochs are not readable: {error}") from error
    if not 0 < epochs.version <= VERSION:
        raise CorruptChunk(f"version {epochs.version} of the epochs is not {VERSION}")
    return epochs
