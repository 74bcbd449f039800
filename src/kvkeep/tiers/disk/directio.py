"""The edge to the file system: system calls behind two small protocols, and the loops that make a transfer whole.

Errors are OSErrors; the caller knows which chunk it was and translates them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.tier import Bytes

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES, _STATX_DIO_AT = 256, 0x98
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a fifo in a file's place keeps nobody waiting
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_LIBC = ctypes.CDLL(None, use_errno=True)  # its calls let go of the GIL


class Inode(NamedTuple):
    """Which file it is, whatever it is called."""

    device: int
    number: int


class Stat(NamedTuple):
    """A file's size, the bytes that it takes on the device, when it was written (ns), and which file it is.

    `is_file`: it is a regular file, and no directory, link, fifo, socket or device.
    """

    nbytes: int
    allocated_nbytes: int
    written_ns: int
    inode: Inode
    is_file: bool


class Name(NamedTuple):
    """One name in a directory."""

    name: str
    is_directory: bool
    stat: Stat


class Descriptors(Protocol):
    """What is done to open files. A transfer may be short."""

    def open(self, path: str, create: bool, direct: bool) -> int:
        """A descriptor: of a new file to write (0600, an error if there is one), or of one that is there to read."""

    def close(self, fd: int) -> None:
        """Close the descriptor; never fails."""

    def stat(self, file: int | str) -> Stat:
        """The state of an open file, or of what has a name."""

    def readv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """Fills the buffers in order from `offset`; bytes read."""

    def writev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """Writes the buffers in order at `offset`; bytes written."""

    def sync(self, fd: int) -> None:
        """Returns when the file (or directory) is durable."""


class Names(Protocol):
    """What is done to names."""

    def publish(self, temporary: str, path: str) -> None:
        """Renames; FileExistsError if `path` is taken, and then nothing has changed."""

    def replace(self, temporary: str, path: str) -> None:
        """Renames over whatever is there."""

    def unlink(self, path: str) -> None:
        """Removes a file's name, or a directory that is empty."""

    def mkdir(self, path: str) -> None:
        """Makes a directory with its parents, 0700; it may be there already."""

    def scan(self, path: str) -> Iterator[Name]:
        """The names in a directory; one that vanishes meanwhile is left out."""

    def free_nbytes(self, path: str) -> int:
        """What the file system has left for us."""


class Files(NamedTuple):
    """The file system as kvkeep sees it."""

    data: Descriptors
    names: Names


class PosixDescriptors:
    """The kernel's calls."""

    def open(self, path: str, create: bool, direct: bool) -> int:
        """As `Descriptors.open`."""
        return os.open(path, (_CREATE if create else _READ) | (os.O_DIRECT if direct else 0), 0o600)

    def close(self, fd: int) -> None:
        """As `Descriptors.close`."""
        try:
            os.close(fd)
        except OSError:  # the descriptor is gone either way; a late write error shows in the checksums
            return

    def stat(self, file: int | str) -> Stat:
        """As `Descriptors.stat`."""
        return _stat(os.stat(file, follow_symlinks=isinstance(file, int)))

    def readv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """As `Descriptors.readv`."""
        return os.preadv(fd, [buffer.data for buffer in buffers], offset)

    def writev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """As `Descriptors.writev`."""
        return os.pwritev(fd, [buffer.data for buffer in buffers], offset)

    def sync(self, fd: int) -> None:
        """As `Descriptors.sync`."""
        os.fsync(fd)


class PosixNames:
    """The kernel's calls."""

    def publish(self, temporary: str, path: str) -> None:
        """As `Names.publish`: renameat2, or a link where the file system does not know it."""
        rename = getattr(_LIBC, "renameat2", None)
        source, target = os.fsencode(temporary), os.fsencode(path)
        if rename is not None and rename(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
            return
        code = errno.ENOSYS if rename is None else ctypes.get_errno()
        if code not in _NOT_HERE:
            raise OSError(code, os.strerror(code), path)
        os.link(temporary, path)
        try:
            os.unlink(temporary)
        except OSError:
            os.unlink(path)
            raise

    def replace(self, temporary: str, path: str) -> None:
        """As `Names.replace`."""
        os.replace(temporary, path)

    def unlink(self, path: str) -> None:
        """As `Names.unlink`."""
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)

    def mkdir(self, path: str) -> None:
        """As `Names.mkdir`."""
        parent = os.path.dirname(path)
        if parent and not os.path.isdir(parent):
            self.mkdir(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def scan(self, path: str) -> Iterator[Name]:
        """As `Names.scan`."""
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    yield Name(
                        entry.name, entry.is_dir(follow_symlinks=False), _stat(entry.stat(follow_symlinks=False))
                    )
                except FileNotFoundError:
                    continue

    def free_nbytes(self, path: str) -> int:
        """As `Names.free_nbytes`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def posix_files() -> Files:
    """The file system itself."""
    return Files(PosixDescriptors(), PosixNames())


def read_all(data: Descriptors, fd: int, buffers: Sequence[Bytes], start: int = 0) -> int:
    """Fill the buffers from byte `start` of the file on; bytes read, fewer only where the file ends."""
    done, wanted = 0, sum([buffer.nbytes for buffer in buffers])
    while done < wanted:
        got = data.readv(fd, _rest(buffers, done) if done else buffers, start + done)
        if got == 0:
            break
        done += got
    return done


def write_all(data: Descriptors, fd: int, buffers: Sequence[Bytes]) -> None:
    """Write the buffers from the file's beginning; OSError if not all of it can be written."""
    done, wanted = 0, sum([buffer.nbytes for buffer in buffers])
    while done < wanted:
        put = data.writev(fd, _rest(buffers, done) if done else buffers, done)
        if put == 0:
            raise OSError(errno.EIO, "the device takes no more bytes")
        done += put


def write_durably(files: Files, temporary: str, path: str, octets: bytes) -> None:
    """Write `octets` to `path`, whole and durable, over whatever is there; on an OSError the old content may stay."""
    fd = files.data.open(temporary, create=True, direct=False)
    put_durably(files, fd, temporary, path, octets=octets)


def put_durably(files: Files, fd: int, temporary: str, path: str, octets: bytes) -> None:
    """The same through a file that is open for writing and no longer than `octets`; this closes it."""
    try:
        write_all(files.data, fd, [np.frombuffer(octets, np.uint8)])
        files.data.sync(fd)
        files.names.replace(temporary, path)
    except OSError:
        unlink_quietly(files, temporary)
        raise
    finally:
        files.data.close(fd)
    sync_directory(files, os.path.dirname(path))


def sync_directory(files: Files, path: str) -> None:
    """Make a directory's names durable."""
    fd = files.data.open(path, create=False, direct=False)
    try:
        files.data.sync(fd)
    finally:
        files.data.close(fd)


def read_small(files: Files, path: str, max_nbytes: int) -> bytes | None:
    """A small file's content; None if there is no file, or if it is longer than `max_nbytes`."""
    try:
        fd = files.data.open(path, create=False, direct=False)
    except FileNotFoundError:
        return None
    try:
        found = files.data.stat(fd)
        if not found.is_file or found.nbytes > max_nbytes:
            return None
        octets = np.empty(found.nbytes, np.uint8)
        return octets[: read_all(files.data, fd, [octets])].tobytes()
    finally:
        files.data.close(fd)


def takes_direct(files: Files, path: str) -> bool:
    """Whether files in a directory can be read and written past the page cache: this tries it.

    `path` is a free name in the directory; the file is deleted again.
    """
    try:
        fd = files.data.open(path, create=True, direct=True)
    except OSError:
        unlink_quietly(files, path)  # some file systems make the file and then refuse the flag
        return False
    try:
        out, back = aligned_bytes(ALIGN_NBYTES), aligned_bytes(ALIGN_NBYTES)
        out[:] = 0xA5
        write_all(files.data, fd, [out])
        whole = read_all(files.data, fd, [back]) == ALIGN_NBYTES and bool((back == out).all())
        return whole and direct_alignment(fd) in range(1, ALIGN_NBYTES + 1)
    except OSError:
        return False
    finally:
        files.data.close(fd)
        unlink_quietly(files, path)


def direct_alignment(fd: int) -> int:
    """The alignment of direct transfers that statx asks for (bytes; 0: not possible; 1: it does not say)."""
    statx = getattr(_LIBC, "statx", None)
    found = ctypes.create_string_buffer(_STATX_NBYTES)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found) != 0:
        return 1
    if not int.from_bytes(found.raw[:4], "little") & _STATX_DIOALIGN:
        return 1
    memory = int.from_bytes(found.raw[_STATX_DIO_AT : _STATX_DIO_AT + 4], "little")
    offset = int.from_bytes(found.raw[_STATX_DIO_AT + 4 : _STATX_DIO_AT + 8], "little")
    return max(memory, offset)


def _rest(buffers: Sequence[Bytes], done: int) -> list[Bytes]:
    """The buffers without their first `done` bytes."""
    rest = []
    for buffer in buffers:
        if done < buffer.nbytes:
            rest.append(buffer[done:] if done else buffer)
        done = max(0, done - buffer.nbytes)
    return rest


def unlink_quietly(files: Files, path: str) -> None:
    """Delete a name if that is possible."""
    try:
        files.names.unlink(path)
    except OSError:
        return


def _stat(found: os.stat_result) -> Stat:
    inode, is_file = Inode(found.st_dev, found.st_ino), stat.S_ISREG(found.st_mode)
    return Stat(found.st_size, found.st_blocks * 512, found.st_mtime_ns, inode, is_file=is_file)
