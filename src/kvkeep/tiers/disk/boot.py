"""What a directory of records needs once: its lock at the start, the scan of its names, its order at the end.

Runs in an I/O thread. Beside the records DIR holds `lock`, `epochs`, `new/`, and after a clean end `order`: the keys in
eviction order and the bytes that they took. The first write of the next run deletes `order` before it writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import xxhash

from kvkeep.core.units import KEY_NBYTES, SUM_NBYTES
from kvkeep.errors import TierOwned, TierUnavailable
from kvkeep.tiers.disk.directio import Files, read_small, sync_directory, unlink_quietly, write_durably
from kvkeep.tiers.disk.files import RecordFiles
from kvkeep.tiers.record import key_in_name

_HEX = {digits: re.compile(f"[0-9a-f]{{{digits}}}") for digits in (2, 32)}
_ORDER_HEAD = struct.Struct("<8sQ")
_ORDER_MAGIC = b"kvorder1"
_MAX_ORDER_NBYTES = 1 << 30


class Order(NamedTuple):
    """What a clean end left: the keys, the first to be evicted first, and the bytes in use."""

    keys: Sequence[bytes]
    used_nbytes: int


class FoundRecord(NamedTuple):
    """A record that the scan found by its name, and the bytes that its file takes."""

    key: bytes
    allocated_nbytes: int


def lock_directory(files: Files, root: str) -> int:
    """Make the directory and own it until the returned descriptor is closed; the lock's file has our process id.

    TierOwned where another process owns it, TierUnavailable where this user cannot write to it.
    """
    try:
        files.names.mkdir(f"{root}/new")
        fd = os.open(f"{root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise TierUnavailable(
            f"{root} cannot be used: {error}; let this user write to it, or set disk_path to another directory"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = _owner_in(fd)
        os.close(fd)
        raise TierOwned(f"{root} belongs to another process{who}: give this one a directory of its own") from error
    with suppress(OSError):  # a full disk: the lock holds without our id
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def refuse_foreign(root: str) -> None:
    """Raise TierUnavailable if a user other than this one and root may put records into a directory.

    A group with this user's own number may write, for by custom it has no other member. Where the directory cannot be
    looked at, `lock_directory` makes it or says what is wrong.
    """
    try:
        found = os.stat(root)
    except OSError:
        return
    user = os.geteuid()
    own_group = found.st_gid == user == os.getegid()
    if found.st_uid not in (user, 0):
        why = f"belongs to user {found.st_uid} and not to this one ({user})"
    elif found.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP):
        why = f"can be written by others (its mode is {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise TierUnavailable(
        f"{root} {why}, who could put there what an engine takes for its own: give kvkeep a directory of its own, "
        f"as {os.path.join(root, 'kvkeep')}; it makes one that is not there"
    )


def _owner_in(lock_fd: int) -> str:
    """The lock's owner, as ` (pid N)`, if the lock's file names it."""
    try:
        said = os.pread(lock_fd, 20, 0).decode()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (pid {said})" if said.isdecimal() else ""


def read_order(record_files: RecordFiles) -> Order | None:
    """What the last run left; None if it did not end cleanly, or if its file cannot be read."""
    try:
        octets = read_small(record_files.files, f"{record_files.root}/order", _MAX_ORDER_NBYTES)
    except OSError:  # a link, or a failing device: the scan does without it
        return None
    if octets is None or len(octets) < _ORDER_HEAD.size + SUM_NBYTES:
        return None
    body = memoryview(octets)[:-SUM_NBYTES]
    magic, used_nbytes = _ORDER_HEAD.unpack_from(body)
    if magic != _ORDER_MAGIC or xxhash.xxh3_128_digest(body) != octets[-SUM_NBYTES:]:
        return None
    starts = range(_ORDER_HEAD.size, len(body) - KEY_NBYTES + 1, KEY_NBYTES)
    return Order([octets[start : start + KEY_NBYTES] for start in starts], used_nbytes)


def write_order(record_files: RecordFiles, order: Order) -> None:
    """Leave the order for the next start."""
    body = _ORDER_HEAD.pack(_ORDER_MAGIC, order.used_nbytes) + b"".join(order.keys)
    octets = body + xxhash.xxh3_128_digest(body)
    write_durably(record_files.files, record_files.state_path, f"{record_files.root}/order", octets)


def forget_order(record_files: RecordFiles) -> None:
    """Delete the order, durably: after the first write its bytes in use would be too few."""
    path = f"{record_files.root}/order"
    try:
        found = record_files.files.data.stat(path)
    except FileNotFoundError:
        return
    try:
        record_files.files.names.unlink(path)
    except OSError:
        if found.is_file:
            raise
        return  # a directory that is not empty, which is never read as an order
    sync_directory(record_files.files, record_files.root)


def is_empty(record_files: RecordFiles) -> bool:
    """Whether there is nothing that takes room."""
    names = [entry.name for entry in record_files.files.names.scan(record_files.root) if entry.is_directory]
    return names == ["new"] and not list(record_files.files.names.scan(f"{record_files.root}/new"))


def find_records(record_files: RecordFiles, order: Sequence[bytes]) -> list[FoundRecord]:
    """Every record by name and size, the first to be evicted first.

    Deletes temporary files of earlier runs, and directories without a record. Records that `order` does not know come
    before the others, in the order in which they were written.
    """
    for entry in record_files.files.names.scan(f"{record_files.root}/new"):
        if not entry.is_directory and not entry.name.startswith(f"{record_files.start_id}-"):
            record_files.files.names.unlink(f"{record_files.root}/new/{entry.name}")
    ranks = {key: rank for rank, key in enumerate(order)}
    found = [
        (ranks.get(key, -1), written_ns, FoundRecord(key, nbytes))
        for key, nbytes, written_ns in record_names(record_files.files, record_files.root, record_files.is_closed)
    ]
    _remove_empty(record_files, {os.path.dirname(record_files.path(record.key)) for _, _, record in found})
    found.sort()
    return [record for _, _, record in found]


def _remove_empty(record_files: RecordFiles, used: set[str]) -> None:
    """Delete the directories that are not in use; the file system keeps a directory that is not empty."""
    for namespace in _directories(record_files.files, record_files.root, 32):
        path = f"{record_files.root}/{namespace}"
        for empty in {f"{path}/{first}" for first in _directories(record_files.files, path, 2)} - used:
            unlink_quietly(record_files.files, empty)
        if not any(directory.startswith(path) for directory in used):
            unlink_quietly(record_files.files, path)


def record_names(files: Files, root: str, is_closed: Callable[[], bool]) -> Iterator[tuple[bytes, int, int]]:
    """Every key that has a record's name in the directory, its allocated bytes, and when it was written (ns).

    Raises OSError where a directory cannot be read, or once it `is_closed`.
    """
    for namespace in _directories(files, root, 32):
        for first in _directories(files, f"{root}/{namespace}", 2):
            if is_closed():
                raise OSError(errno.ESHUTDOWN, "the tier was closed during the scan")
            for name, is_directory, found in files.names.scan(f"{root}/{namespace}/{first}"):
                key = None if is_directory else key_in_name(f"{namespace}/{first}/{name}")
                if key is not None:
                    yield key, found.allocated_nbytes, found.written_ns


def _directories(files: Files, path: str, digits: int) -> list[str]:
    return [entry.name for entry in files.names.scan(path) if entry.is_directory and _HEX[digits].fullmatch(entry.name)]
