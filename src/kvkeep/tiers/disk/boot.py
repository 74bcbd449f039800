"""What a directory of records needs once: its lock at the start, a look through it, its order at the end.

Runs in an I/O thread. Knows nothing about limits or who asks. Beside the records DIR holds `lock`, `epochs`, `order`
(which keys in which order of use, and the bytes that they took: written by a clean end, gone before anything is stored)
and `new/`.
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
from kvkeep.tiers.disk.files import Shelf

_HEX = {digits: re.compile(f"[0-9a-f]{{{digits}}}") for digits in (2, 32, 64)}
_ORDER_HEAD = struct.Struct("<8sQ")
_ORDER_MAGIC = b"kvorder1"
_MAX_ORDER_NBYTES = 1 << 30


class Order(NamedTuple):
    """How a clean end left the directory: its keys, first to be evicted first, and the bytes in use."""

    keys: Sequence[bytes]
    used_nbytes: int


class FoundRecords(NamedTuple):
    """A record by its name, and what it takes on the device."""

    key: bytes
    allocated_nbytes: int


def lock_directory(files: Files, root: str) -> int:
    """Make the directory and own it: the descriptor whose end gives it up; its file has this process's id.

    Raises TierOwned where another process does, TierUnavailable where it cannot be written.
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
        who = _named_in(fd)
        os.close(fd)
        raise TierOwned(f"{root} belongs to another process{who}: give this one a directory of its own") from error
    with suppress(OSError):  # on a full disk nobody is named
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def refuse_foreign(root: str) -> None:
    """TierUnavailable where another user than this one or root may put records into a directory.

    A group may that has this user's own number, which by custom is its alone. One that cannot be looked at is left to
    `lock_directory`, which makes it or says what is wrong.
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


def _named_in(lock_fd: int) -> str:
    """Who has the lock, as far as its file says."""
    try:
        said = os.pread(lock_fd, 20, 0).decode()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (pid {said})" if said.isdecimal() else ""


def read_order(shelf: Shelf) -> Order | None:
    """How the last end left the directory; None if it was no clean one, or if that cannot be read."""
    try:
        octets = read_small(shelf.files, f"{shelf.root}/order", _MAX_ORDER_NBYTES)
    except OSError:  # a link, or a device that does not give it: the directory is looked through without it
        return None
    if octets is None or len(octets) < _ORDER_HEAD.size + SUM_NBYTES:
        return None
    body = memoryview(octets)[:-SUM_NBYTES]
    magic, used_nbytes = _ORDER_HEAD.unpack_from(body)
    if magic != _ORDER_MAGIC or xxhash.xxh3_128_digest(body) != octets[-SUM_NBYTES:]:
        return None
    places = range(_ORDER_HEAD.size, len(body) - KEY_NBYTES + 1, KEY_NBYTES)
    return Order([octets[place : place + KEY_NBYTES] for place in places], used_nbytes)


def write_order(shelf: Shelf, order: Order) -> None:
    """Leave the order for the next start."""
    body = _ORDER_HEAD.pack(_ORDER_MAGIC, order.used_nbytes) + b"".join(order.keys)
    octets = body + xxhash.xxh3_128_digest(body)
    write_durably(shelf.files, shelf.state_path, f"{shelf.root}/order", octets)


def forget_order(shelf: Shelf) -> None:
    """Remove the order, durably: once something is stored it is no bound any more."""
    path = f"{shelf.root}/order"
    try:
        found = shelf.files.data.stat(path)
    except FileNotFoundError:
        return
    try:
        shelf.files.names.unlink(path)
    except OSError:
        if found.is_file:
            raise
        return  # a directory that is not empty: it is never read as an order
    sync_directory(shelf.files, shelf.root)


def is_empty(shelf: Shelf) -> bool:
    """Whether an earlier boot can have left nothing that takes room."""
    names = [one.name for one in shelf.files.names.scan(shelf.root) if one.is_directory]
    return names == ["new"] and not list(shelf.files.names.scan(f"{shelf.root}/new"))


def find_records(shelf: Shelf, order: Sequence[bytes]) -> list[FoundRecords]:
    """Every record by name and size, the first to be evicted first.

    Temporary files of earlier boots are removed, and directories without a record. The order is the one given, and
    where that does not know a record, that in which they were written.
    """
    for one in shelf.files.names.scan(f"{shelf.root}/new"):
        if not one.is_directory and not one.name.startswith(f"{shelf.boot}-"):
            shelf.files.names.unlink(f"{shelf.root}/new/{one.name}")
    places = {key: place for place, key in enumerate(order)}
    found = [
        (places.get(key, -1), written_ns, FoundRecords(key, nbytes))
        for key, nbytes, written_ns in record_names(shelf.files, shelf.root, shelf.is_closed)
    ]
    _remove_empty(shelf, {os.path.dirname(shelf.path(one.key)) for _, _, one in found})
    found.sort()
    return [one for _, _, one in found]


def _remove_empty(shelf: Shelf, used: set[str]) -> None:
    """Removes the directories that are not in use; one that has got a record or has something else stays."""
    for namespace in _directories(shelf.files, shelf.root, 32):
        path = f"{shelf.root}/{namespace}"
        for empty in {f"{path}/{first}" for first in _directories(shelf.files, path, 2)} - used:
            unlink_quietly(shelf.files, empty)
        if not any(one.startswith(path) for one in used):
            unlink_quietly(shelf.files, path)


def record_names(files: Files, root: str, is_closed: Callable[[], bool]) -> Iterator[tuple[bytes, int, int]]:
    """Every key with a name in the directory, its allocated bytes, and when it was written (ns).

    Raises OSError where a directory cannot be read, or once it `is_closed`.
    """
    for namespace in _directories(files, root, 32):
        for first in _directories(files, f"{root}/{namespace}", 2):
            if is_closed():
                raise OSError(errno.ESHUTDOWN, "the tier was closed while it looked through the directory")
            path = f"{root}/{namespace}/{first}"
            for name, is_directory, found in files.names.scan(path):
                if not is_directory and name[:2] == first and _HEX[64].fullmatch(name):
                    yield bytes.fromhex(namespace + name), found.allocated_nbytes, found.written_ns


def _directories(files: Files, path: str, digits: int) -> list[str]:
    return [one.name for one in files.names.scan(path) if one.is_directory and _HEX[digits].fullmatch(one.name)]
