"""Records as files of one directory: open, read, write, name and delete them. Runs in the I/O threads.

A record is DIR/<its name>; while it is being written it is in DIR/new. Any thread may call anything at any time. An
error of one record is the answer for that record; only an error of the whole directory is raised, as an OSError. Limits
and the order of use are the ledger's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from kvkeep.config import Durability
from kvkeep.errors import CorruptChunk
from kvkeep.tiers.aligned import is_aligned
from kvkeep.tiers.disk.directio import Files, Inode, Stat, read_all, sync_directory, write_all
from kvkeep.tiers.disk.threads import Scratch
from kvkeep.tiers.record import Records, decode_header, header_nbytes, record_name, stated_header_nbytes
from kvkeep.tiers.tier import Read, Stored, Write

_TRIES = 4  # the start-up scan may be removing empty directories
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Verdict(Enum):
    """What a read found."""

    GOOD = "good"
    ABSENT = "absent"
    BAD = "bad"  # torn, foreign, changed, of another shape or of an old epoch
    FAILED = "failed"  # the device did not give it


class ReadResult(NamedTuple):
    """The result of a read: the chunk's sums if the record is good, and which file it was."""

    verdict: Verdict
    sums: bytes = b""
    stat: Stat | None = None


class WriteResult(NamedTuple):
    """The result of a write: what was stored, the bytes that the file takes, an errno or 0.

    `left`: a file of it may have stayed behind. STORED with an `error`: the record has its name, but a power cut may
    take it away, so a caller that wants durability must hear that it was refused.
    """

    stored: Stored
    nbytes: int = 0
    error: int = 0
    left: bool = False


class Staged(NamedTuple):
    """A record under its temporary name, still open."""

    path: str
    fd: int
    write: Write
    epoch: int


class RecordFiles(NamedTuple):
    """One directory; `direct`: past the page cache; `start_id` is in the names of our temporary files and of no other
    run's.
    """

    root: str
    files: Files
    direct: bool
    durability: Durability
    min_free_nbytes: int
    start_id: str
    numbers: Iterator[int]
    is_closed: Callable[[], bool]
    records: Records

    def path(self, key: bytes) -> str:
        """The path of a key's record."""
        return f"{self.root}/{record_name(key)}"

    @property
    def temporary_path(self) -> str:
        """A path in DIR/new that nothing has."""
        return f"{self.root}/new/{self.start_id}-{next(self.numbers)}"

    @property
    def state_path(self) -> str:
        """The same for a file that is no record."""
        return f"{self.temporary_path}-state"

    # ---- read

    def read(self, reads: Sequence[tuple[Read, int]], scratch: Scratch) -> list[ReadResult]:
        """Read records, each of the epoch beside it, into the memory of the reads, and verify them."""
        return [self._read(read, epoch, scratch) for read, epoch in reads]

    def open_record(self, read: Read) -> int | ReadResult:
        """Open a record's file; the caller closes it. A result where there is none to open."""
        try:
            return self.files.data.open(self.path(read.key), False, self.direct and is_aligned(read.into))
        except FileNotFoundError:
            return ReadResult(Verdict.ABSENT)
        except OSError as error:  # ELOOP: a link is in its place, which is no record of ours
            return ReadResult(Verdict.BAD if error.errno == errno.ELOOP else Verdict.FAILED)

    def _read(self, read: Read, epoch: int, scratch: Scratch) -> ReadResult:
        data, fd = self.files.data, self.open_record(read)
        if isinstance(fd, ReadResult):
            return fd
        try:
            stat = data.stat(fd)
            header = scratch.take(header_nbytes(len(read.sizes)))
            payload = self.records.payload_memory(read, stat.nbytes - header.nbytes)
            if not stat.is_file or payload is None:
                return ReadResult(Verdict.BAD, b"", stat)
            if read_all(data, fd, [header, payload]) != stat.nbytes:
                return ReadResult(Verdict.BAD, b"", stat)
            sums = self.records.verify(header, payload, read, epoch)
            return ReadResult(Verdict.GOOD, sums, stat) if sums is not None else ReadResult(Verdict.BAD, b"", stat)
        except OSError:
            return ReadResult(Verdict.FAILED)
        finally:
            data.close(fd)

    def is_good(self, write: Write, epoch: int, scratch: Scratch) -> Stat | None:
        """The file that has a chunk's name, if its header and length are those of this chunk in this epoch."""
        data = self.files.data
        try:
            fd = data.open(self.path(write.key), create=False, direct=self.direct)
        except OSError:
            return None
        try:
            stat = data.stat(fd)
            octets = scratch.take(header_nbytes(len(write.sizes)))
            found = self.records.header_of(octets[: read_all(data, fd, [octets])], write, epoch)
            return stat if found is not None and stat.nbytes == found.nbytes else None
        except OSError:
            return None
        finally:
            data.close(fd)

    def epoch_of(self, key: bytes, scratch: Scratch) -> int | None:
        """The epoch in a record's header; None: there is no readable header of this key."""
        data = self.files.data
        try:
            fd = data.open(self.path(key), create=False, direct=self.direct)
        except OSError:
            return None
        try:
            octets = scratch.take(header_nbytes(1))
            if read_all(data, fd, [octets]) == octets.nbytes:
                octets = scratch.take(stated_header_nbytes(octets))
                header = decode_header(octets[: read_all(data, fd, [octets])])
                return header.epoch if header.key == key else None
        except (OSError, CorruptChunk):
            return None
        finally:
            data.close(fd)
        return None

    # ---- write

    def write(self, writes: Sequence[tuple[Write, int]], scratch: Scratch) -> list[WriteResult]:
        """Write records, each of the epoch beside it, and give them their names."""
        if self.durability is Durability.GROUP:
            return self._write_group(writes, scratch)
        return [self._write_group([write], scratch)[0] for write in writes]

    def _write_group(self, writes: Sequence[tuple[Write, int]], scratch: Scratch) -> list[WriteResult]:
        staged = [self._stage(write, epoch, scratch) for write, epoch in writes]
        results = [
            file if isinstance(file, WriteResult) else self._publish(file, scratch) for file in self._sync(staged)
        ]
        if self.durability is Durability.NONE:
            return results
        paths = [os.path.dirname(self.path(write.key)) for write, _ in writes]
        errors = {path: self._sync_names(path) for path in set(paths)}
        return [
            result._replace(error=errors[path]) if result.stored is Stored.STORED else result
            for path, result in zip(paths, results, strict=True)
        ]

    def _stage(self, write: Write, epoch: int, scratch: Scratch) -> Staged | WriteResult:
        data, path = self.files.data, self.temporary_path
        octets = scratch.take(header_nbytes(len(write.sizes)))
        payload = self.records.make(write, epoch, octets)
        try:
            if self.files.names.free_nbytes(self.root) < self.min_free_nbytes + octets.nbytes + payload.nbytes:
                return WriteResult(Stored.REFUSED, error=errno.ENOSPC)
            fd = data.open(path, create=True, direct=self.direct and is_aligned(payload))
        except OSError as error:
            return WriteResult(Stored.REFUSED, error=error.errno or errno.EIO, left=not self._unlink(path))
        try:
            write_all(data, fd, [octets, payload])
        except OSError as error:
            return self._drop(Staged(path, fd, write, epoch), error.errno or errno.EIO)
        return Staged(path, fd, write, epoch)

    def _sync(self, staged: Sequence[Staged | WriteResult]) -> list[Staged | WriteResult]:
        """Make the files durable, where the setting says so; one that fails is dropped."""
        if self.durability is Durability.NONE:
            return list(staged)
        synced: list[Staged | WriteResult] = []
        for file in staged:
            if isinstance(file, Staged):
                try:
                    self.files.data.sync(file.fd)
                except OSError as error:
                    synced.append(self._drop(file, error.errno or errno.EIO))
                    continue
            synced.append(file)
        return synced

    def _publish(self, staged: Staged, scratch: Scratch) -> WriteResult:
        """Give a record its name; a good record that has the name already is kept, a bad one is deleted first."""
        try:
            nbytes = self.files.data.stat(staged.fd).allocated_nbytes
            if not self._give_name(staged):
                there = self.is_good(staged.write, staged.epoch, scratch)
                if there is not None:
                    return self._drop(staged, 0)._replace(stored=Stored.PRESENT, nbytes=there.allocated_nbytes)
                self.files.names.unlink(self.path(staged.write.key))
                if not self._give_name(staged):
                    return self._drop(staged, errno.EEXIST)
        except OSError as error:
            return self._drop(staged, error.errno or errno.EIO)
        self.files.data.close(staged.fd)
        return WriteResult(Stored.STORED, nbytes)

    def _give_name(self, staged: Staged) -> bool:
        """Rename a record to its name; False: another file has that name."""
        if self.is_closed():
            raise OSError(errno.ESHUTDOWN, "the tier was closed while it wrote")
        path = self.path(staged.write.key)
        for _ in range(_TRIES):
            try:
                self.files.names.publish(staged.path, path)
            except FileExistsError:
                return False
            except FileNotFoundError:  # its directory is not there yet, or was empty and the scan has just removed it
                self._ensure(os.path.dirname(path))
            else:
                return True
        raise FileNotFoundError(errno.ENOENT, "its directory goes again and again", path)

    def _ensure(self, path: str) -> None:
        with suppress(FileNotFoundError):  # its parent has just been removed
            self.files.names.mkdir(path)

    def _drop(self, staged: Staged, error: int) -> WriteResult:
        left = not self._unlink(staged.path)
        self.files.data.close(staged.fd)
        return WriteResult(Stored.REFUSED, 0, error, left)

    def _sync_names(self, path: str) -> int:
        """Make a directory's names durable, and its own name and its parent's; the errno, 0 for none."""
        try:
            for directory in (path, os.path.dirname(path), self.root):
                sync_directory(self.files, directory)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    # ---- names

    def delete(self, keys: Sequence[tuple[bytes, Inode | None]]) -> list[int]:
        """Delete records; with an inode only if the file is still that one.

        The bytes that each file took, 0 where there was no file (of that inode), -1 where it is still there.
        """
        return [self._delete(self.path(key), inode) for key, inode in keys]

    def _delete(self, path: str, inode: Inode | None) -> int:
        try:
            stat = self.files.data.stat(path)
        except OSError as error:
            return 0 if error.errno in (errno.ENOENT, errno.ENOTDIR) else -1
        if inode is not None and stat.inode != inode:
            return 0
        return stat.allocated_nbytes if self._unlink(path) else -1

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """The bytes that the files of records take; 0 where there is none. OSError where a file cannot be looked at."""
        sizes = []
        for key in keys:
            try:
                sizes.append(self.files.data.stat(self.path(key)).allocated_nbytes)
            except FileNotFoundError:
                sizes.append(0)
        return sizes

    def _unlink(self, path: str) -> bool:
        try:
            self.files.names.unlink(path)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ENOTDIR)
        return True

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys have a file."""
        return [self._exists(self.path(key)) for key in keys]

    def _exists(self, path: str) -> bool:
        try:
            return self.files.data.stat(path).nbytes > 0
        except OSError:
            return False

    def free_nbytes(self) -> int:
        """What the file system has left for us, without the bytes that must stay free."""
        return self.files.names.free_nbytes(self.root) - self.min_free_nbytes
