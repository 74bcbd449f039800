"""What the namespaces of a disk directory are, in a file beside its records: a start can say why none there is its own.

For people only: a file that cannot be read or written changes nothing but words. A thread does both, since a disk may
hang; it is never joined. Knows nothing about records.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import stat
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvkeep.store.namespaces import MAX_IDENTITY_NBYTES, MOST, Named, Namespaces, plainly_named

log = logging.getLogger("kvkeep.store")

FILE = "identities.json"
MAX_NBYTES = 8 * MOST * MAX_IDENTITY_NBYTES


class NamespaceLine(msgspec.Struct, frozen=True):
    """One namespace (hex) of the file."""

    namespace: str
    name: str
    identity: str


def load_identities(directory: Path) -> dict[bytes, Named]:
    """The namespaces that a directory has met, the latest at the end.

    OSError where there is no such file that can be read, ValueError where it is not what `write_identities` writes.
    """
    file = os.open(directory / FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # a fifo would wait
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is no regular file")
        octets = opened.read(MAX_NBYTES)
    try:
        lines = msgspec.json.decode(octets, type=list[NamespaceLine])
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return {bytes.fromhex(line.namespace): plainly_named(line.name, line.identity) for line in lines[-MOST:]}


def read_identities(directory: Path) -> dict[bytes, Named]:
    """As `load_identities`; nothing where that fails."""
    try:
        return load_identities(directory)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return {}


def write_identities(directory: Path, known: Mapping[bytes, Named]) -> None:
    """Puts these in the file's place, in a directory that is the caller's own; OSError if that cannot be.

    Where they take more than `MAX_NBYTES`, those that were named last.
    """
    lines: deque[bytes] = deque()
    nbytes = len(b"[\n\n]\n")
    for namespace, named in reversed(list(known.items())):
        line = msgspec.json.encode(NamespaceLine(namespace.hex(), named.name, named.identity))
        nbytes += len(line) + len(b",\n")
        if nbytes > MAX_NBYTES:
            break
        lines.appendleft(line)
    fresh = directory / f".{FILE}"
    fresh.unlink(missing_ok=True)  # of one that was killed; or a link, whose target is nothing of ours
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(b"[\n" + b",\n".join(lines) + b"\n]\n")
    fresh.replace(directory / FILE)


@dataclass
class Identities:
    """Keeps a store's namespaces in `directory` as well, and tells them what was there before."""

    directory: Path
    namespaces: Namespaces
    _wanted: queue.Queue[dict[bytes, Named]] = field(default_factory=lambda: queue.Queue(MOST))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to read; what was there is told in the loop, what is named from then on is written."""
        threading.Thread(target=self._serve, args=(loop,), daemon=True, name="kvkeep-identities").start()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self._recall, read_identities(self.directory))
        while True:
            known = self._wanted.get()
            try:
                write_identities(self.directory, known)
            except OSError as error:
                log.debug("%s was not written: %s", self.directory / FILE, error)

    def _recall(self, found: Mapping[bytes, Named]) -> None:
        for line in self.namespaces.recall(found):
            log.info("no chunk kept in %s before matches the engine that joined: %s", self.directory, line)
        self.namespaces.changed = self._write
        if self.namespaces.known:
            self._write()

    def _write(self) -> None:
        try:
            self._wanted.put_nowait(dict(self.namespaces.known))
        except queue.Full:  # the disk hangs
            log.debug("%s is not kept up", self.directory / FILE)
