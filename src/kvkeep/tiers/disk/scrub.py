"""Reads every byte of a directory of records, and says what is wrong with each file.

A directory that another process owns can be read so, but not repaired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import CorruptChunk
from kvkeep.tiers.disk.boot import record_names
from kvkeep.tiers.disk.directio import Files, read_all, read_small
from kvkeep.tiers.epochs import Epochs, decode_epochs
from kvkeep.tiers.record import (
    VERSION,
    decode_header,
    first_bad_range,
    record_name,
    stated_header_nbytes,
    stated_version,
)
from kvkeep.tiers.tier import Bytes

_FIRST_NBYTES = 4096
_MAX_EPOCHS_NBYTES = 1 << 20


class Condition(Enum):
    """What a file is."""

    GOOD = "good"
    TORN = "torn"  # shorter or longer than its header says
    FOREIGN = "foreign"  # a record, but of another key than its name says
    CORRUPT = "corrupt"  # a checksum does not hold, or it is no record at all
    OLD = "old"  # of an epoch before a clear, or of an earlier format: never given back
    UNREADABLE = "unreadable"  # the device did not give it


class Finding(NamedTuple):
    """One file: its path, what it is, and why in words."""

    path: str
    condition: Condition
    why: str = ""


def record_paths(files: Files, root: str) -> list[tuple[bytes, str]]:
    """Every key that has a record's name, and its path."""
    keys = sorted(key for key, _, _ in record_names(files, root, lambda: False))
    return [(key, f"{root}/{record_name(key)}") for key in keys]


def known_epochs(files: Files, root: str) -> Epochs | None:
    """The directory's epochs; None where they cannot be read."""
    try:
        return decode_epochs(read_small(files, f"{root}/epochs", _MAX_EPOCHS_NBYTES) or b"")
    except CorruptChunk:
        return None


def scrub(files: Files, records: Sequence[tuple[bytes, str]], epochs: Epochs | None) -> Iterator[Finding | None]:
    """What each file is; None for a file that has gone meanwhile. Without epochs every record is old."""
    for key, path in records:
        try:
            yield _examine(files, key, path, epochs)
        except FileNotFoundError:
            yield None
        except OSError as error:
            yield Finding(path, Condition.UNREADABLE, str(error))


def _examine(files: Files, key: bytes, path: str, epochs: Epochs | None) -> Finding:
    fd = files.data.open(path, create=False, direct=False)
    try:
        found = files.data.stat(fd)
        if not found.is_file:
            return Finding(path, Condition.CORRUPT, "it is no regular file")
        octets = np.empty(found.nbytes, np.uint8)
        octets = octets[: read_all(files.data, fd, [octets])]
    finally:
        files.data.close(fd)
    condition, why = _judge(octets, key, epochs)
    return Finding(path, condition, why)


def _judge(octets: Bytes, key: bytes, epochs: Epochs | None) -> tuple[Condition, str]:
    if octets.nbytes < _FIRST_NBYTES:
        return Condition.TORN, f"{octets.nbytes} bytes hold no header"
    if (version := stated_version(octets)) is not None and version < VERSION:
        return Condition.OLD, f"it has format version {version}, and is removed when a store next opens the directory"
    try:
        header_nbytes = stated_header_nbytes(octets)
        header = decode_header(octets)
    except CorruptChunk as error:
        return Condition.CORRUPT, str(error)
    if octets.nbytes != header.nbytes:
        return Condition.TORN, f"{octets.nbytes} bytes where the header says {header.nbytes}"
    if header.key != key:
        return Condition.FOREIGN, f"it is the record of {header.key.hex()}"
    bad = first_bad_range(octets[header_nbytes:], header.sizes, header.sums)
    if bad is not None:
        return Condition.CORRUPT, f"the checksum of range {bad} does not hold"
    if epochs is None or header.epoch != epochs.of(key[:NAMESPACE_NBYTES]):
        return Condition.OLD, "it was cleared" if epochs else "there are no epochs that can be read"
    return Condition.GOOD, ""
