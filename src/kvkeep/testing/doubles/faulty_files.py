"""Plays a file system that fails on demand: errors, short transfers, calls that hang, a kill.

It stands between the disk tier and the real files. Knows nothing about records.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.tiers.disk.directio import Files, Inode, Name, Stat, posix_files
from kvkeep.tiers.tier import Bytes


@dataclass(eq=False)
class FaultyDisk:
    """Both protocols of `directio` over real files. Calls are numbered and run one by one.

    `fault(call, path)` gives the error number that this call fails with, 0: none. `short` makes every transfer stop at
    so many bytes (a multiple of 4 KiB where it is direct). From call `kill_at` on nothing has any effect, and what is
    written then is torn; that is what a kill -9 leaves. Calls in `hanging` wait for `wake`: all of a name, or with a
    path after a blank one file's. `after` runs after each. `free` stands for the file system's free bytes.
    """

    real: Files = field(default_factory=posix_files)
    fault: Callable[[str, str], int] = lambda _call, _path: 0
    short: int = 0
    kill_at: int = 1 << 60
    hanging: frozenset[str] = frozenset()
    wake: threading.Event = field(default_factory=threading.Event)
    after: Callable[[], None] = lambda: None
    free: Callable[[], int] | None = None
    calls: int = 0
    waiting: int = 0  # calls that hang, or hung
    paths: dict[int, str] = field(default_factory=dict)  # of open descriptors
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def files(self) -> Files:
        """What a tier takes."""
        return Files(self, self)

    # ---- descriptors

    def open(self, path: str, create: bool, direct: bool) -> int:
        """As `Descriptors.open`."""
        with self._call("create" if create else "open", path):
            fd = self.real.data.open(path, create, direct)
            self.paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """As `Descriptors.close`; never fails."""
        with self._lock:
            self.paths.pop(fd, None)
            self.real.data.close(fd)
            self.after()

    def stat(self, file: int | str) -> Stat:
        """As `Descriptors.stat`."""
        with self._call("stat", self._path(file)):
            return self.real.data.stat(file)

    def readv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """As `Descriptors.readv`."""
        with self._call("readv", self._path(fd)):
            return self.real.data.readv(fd, self._cut(buffers), offset)

    def writev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """As `Descriptors.writev`; the call that is killed writes half of its bytes."""
        if self.calls + 1 == self.kill_at and offset == 0:
            half = sum(buffer.nbytes for buffer in buffers) // 2 // ALIGN_NBYTES * ALIGN_NBYTES
            if half:
                self.real.data.writev(fd, _first(buffers, half), offset)
        with self._call("writev", self._path(fd)):
            return self.real.data.writev(fd, self._cut(buffers), offset)

    def sync(self, fd: int) -> None:
        """As `Descriptors.sync`."""
        with self._call("sync", self._path(fd)):
            self.real.data.sync(fd)

    # ---- names

    def publish(self, temporary: str, path: str) -> None:
        """As `Names.publish`."""
        with self._call("publish", path):
            self.real.names.publish(temporary, path)

    def replace(self, temporary: str, path: str) -> None:
        """As `Names.replace`."""
        with self._call("replace", path):
            self.real.names.replace(temporary, path)

    def unlink(self, path: str) -> None:
        """As `Names.unlink`."""
        with self._call("unlink", path):
            self.real.names.unlink(path)

    def mkdir(self, path: str) -> None:
        """As `Names.mkdir`."""
        with self._call("mkdir", path):
            self.real.names.mkdir(path)

    def scan(self, path: str) -> Iterator[Name]:
        """As `Names.scan`."""
        with self._call("scan", path):
            return iter(list(self.real.names.scan(path)))

    def free_nbytes(self, path: str) -> int:
        """As `Names.free_nbytes`."""
        with self._call("free", path):
            return self.real.names.free_nbytes(path) if self.free is None else self.free()

    # ---- what a test asks

    def allocated_nbytes(self, root: str) -> int:
        """Bytes of all records under `root`: with a name, under a temporary one, or unlinked and still open."""
        with self._lock:
            found: dict[Inode, int] = {}
            for path in list(record_paths(root)):
                with contextlib.suppress(FileNotFoundError):  # a test may remove files past the double
                    stat = self.real.data.stat(path)
                    found[stat.inode] = stat.allocated_nbytes
            for fd, path in self.paths.items():
                if is_record(path):
                    stat = self.real.data.stat(fd)
                    found[stat.inode] = stat.allocated_nbytes
            return sum(found.values())

    def _call(self, name: str, path: str) -> _Call:
        if name in self.hanging or f"{name} {path}" in self.hanging:
            with self._lock:
                self.waiting += 1
            self.wake.wait()
        return _Call(self, name, path)

    def _path(self, file: int | str) -> str:
        return self.paths.get(file, "") if isinstance(file, int) else file

    def _cut(self, buffers: Sequence[Bytes]) -> Sequence[Bytes]:
        return _first(buffers, self.short) if self.short else buffers


@dataclass(eq=False)
class _Call:
    """One call: no other runs meanwhile, and it may be the one that fails."""

    disk: FaultyDisk
    name: str
    path: str

    def __enter__(self) -> None:
        self.disk._lock.acquire()
        self.disk.calls += 1
        code = errno.EIO if self.disk.calls >= self.disk.kill_at else self.disk.fault(self.name, self.path)
        if code:
            self.disk._lock.release()
            raise OSError(code, os.strerror(code), self.path)

    def __exit__(self, *_: object) -> None:
        try:
            self.disk.after()
        finally:
            self.disk._lock.release()


def flip_bit(path: str, bit: int) -> None:
    """Changes one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        octet = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes(np.array([octet ^ 1 << bit % 8], np.uint8)))


def _first(buffers: Sequence[Bytes], nbytes: int) -> list[Bytes]:
    """The beginning of the buffers, `nbytes` in all."""
    cut = []
    for buffer in buffers:
        if nbytes > 0:
            cut.append(buffer[:nbytes])
        nbytes -= buffer.nbytes
    return cut


def is_record(path: str) -> bool:
    """Whether a file of this name is a record, or is to become one."""
    name = os.path.basename(path)
    return (len(name) == 64 or os.path.basename(os.path.dirname(path)) == "new") and not name.endswith("-state")


def record_paths(root: str) -> Iterator[str]:
    """The paths of all records under a directory, those that are being written among them."""
    for directory, _, names in os.walk(root):
        for name in names:
            if is_record(path := os.path.join(directory, name)):
                yield path
