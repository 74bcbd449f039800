"""A file of namespaces beside a directory's records, so that a store can say why it finds nothing there at its start.

For people only: if the file cannot be read or written, only log lines are missing. A thread reads and writes it, for a
disk may hang; nobody waits for that thread. Knows nothing about records.
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
    """The namespaces in a directory's file, the latest at the end.

    OSError if there is none that can be read, ValueError if `write_identities` did not write it.
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
    """As `load_identities`; empty if that fails."""
    try:
        return load_identities(directory)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return {}


def write_identities(directory: Path, known: Mapping[bytes, Named]) -> None:
    """Replace the file in a directory that the caller owns; OSError if that fails.

    If they take more than `MAX_NBYTES`, only those named last.
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
    fresh.unlink(missing_ok=True)  # left by a store that was killed; or a link, which must not be followed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(fresh, flags, 0o600), "wb") as file:
        file.write(b"[\n" + b",\n".join(lines) + b"\n]\n")
    fresh.replace(directory / FILE)


@dataclass
class Identities:
    """Writes a store's namespaces to a file in `directory`, and adds what the file had before to them."""

    directory: Path
    namespaces: Namespaces
    _wanted: queue.Queue[dict[bytes, Named]] = field(default_factory=lambda: queue.Queue(MOST))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread: it reads the file, adds that in the loop, and writes what is named from then on."""
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
            log.debug("%s is not up to date: the disk hangs", self.directory / FILE)
