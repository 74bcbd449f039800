"""Records as files of one directory: what the I/O threads do. Any thread may call anything at any time.

DIR/<namespace>/<first byte of the digest>/<digest>, all in hex; what is being written is in DIR/new. Knows nothing
about limits, order, or who asks. An error of one record is that record's answer; only what concerns the whole directory
is raised, as an OSError.
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
from kvkeep.tiers.record import decode_header, header_nbytes, record_name, stated_header_nbytes
from kvkeep.tiers.records import Records
from kvkeep.tiers.tier import Read, Stored, Write

_TRIES = 4  # a start may be removing empty directories
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Verdict(Enum):
    """What a record turned out to be."""

    GOOD = "good"
    ABSENT = "absent"
    BAD = "bad"  # torn, foreign, changed, of another shape or an old epoch
    FAILED = "failed"  # the device did not give it


class Loaded(NamedTuple):
    """What became of a read: its sums if it is good, which file it was, what that takes on the device."""

    verdict: Verdict
    sums: bytes = b""
    stat: Stat | None = None


class Written(NamedTuple):
    """What became of a write.

    `left` is set where a file of it may have stayed behind. Stored with an `error`: it has its name, but that may not
    outlive a power cut; whoever asked for durability must not be told that it is stored.
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


class Shelf(NamedTuple):
    """One directory; `direct`: past the page cache; `boot` tells our temporary files from those of an earlier boot."""

    root: str
    files: Files
    direct: bool
    durability: Durability
    min_free_nbytes: int
    boot: str
    numbers: Iterator[int]
    is_closed: Callable[[], bool]
    records: Records

    def path(self, key: bytes) -> str:
        """Where the record of a key is."""
        return f"{self.root}/{record_name(key)}"

    @property
    def temporary_path(self) -> str:
        """A name that is free."""
        return f"{self.root}/new/{self.boot}-{next(self.numbers)}"

    @property
    def state_path(self) -> str:
        """The same for what is no record."""
        return f"{self.temporary_path}-state"

    # ---- load

    def load(self, reads: Sequence[tuple[Read, int]], scratch: Scratch) -> list[Loaded]:
        """Read records, each of the epoch beside it, straight into the memory of the reads, and verify them."""
        return [self._load(read, epoch, scratch) for read, epoch in reads]

    def opened(self, read: Read) -> int | Loaded:
        """The file of a record that is to be read, to be closed; or why there is none."""
        try:
            return self.files.data.open(self.path(read.key), False, self.direct and is_aligned(read.into))
        except FileNotFoundError:
            return Loaded(Verdict.ABSENT)
        except OSError as error:  # a link or a directory in its place was not put there by us
            return Loaded(Verdict.BAD if error.errno == errno.ELOOP else Verdict.FAILED)

    def _load(self, read: Read, epoch: int, scratch: Scratch) -> Loaded:
        data, fd = self.files.data, self.opened(read)
        if isinstance(fd, Loaded):
            return fd
        try:
            stat = data.stat(fd)
            header = scratch.take(header_nbytes(len(read.sizes)))
            payload = self.records.payload_memory(read, stat.nbytes - header.nbytes)
            if not stat.is_file or payload is None:
                return Loaded(Verdict.BAD, b"", stat)
            if read_all(data, fd, [header, payload]) != stat.nbytes:
                return Loaded(Verdict.BAD, b"", stat)
            sums = self.records.verify(header, payload, read, epoch)
            return Loaded(Verdict.GOOD, sums, stat) if sums is not None else Loaded(Verdict.BAD, b"", stat)
        except OSError:
            return Loaded(Verdict.FAILED)
        finally:
            data.close(fd)

    def is_good(self, write: Write, epoch: int, scratch: Scratch) -> Stat | None:
        """The file of a key, if as far as its header says it is a record of this chunk in this epoch."""
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
        """The epoch that the record of a key carries; None: there is no readable header of this key."""
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

    # ---- store

    def store(self, writes: Sequence[tuple[Write, int]], scratch: Scratch) -> list[Written]:
        """Write records, each of the epoch beside it, and give them their names."""
        if self.durability is Durability.GROUP:
            return self._store_group(writes, scratch)
        return [self._store_group([one], scratch)[0] for one in writes]

    def _store_group(self, writes: Sequence[tuple[Write, int]], scratch: Scratch) -> list[Written]:
        staged = [self._stage(write, epoch, scratch) for write, epoch in writes]
        written = [one if isinstance(one, Written) else self._publish(one, scratch) for one in self._synced(staged)]
        if self.durability is Durability.NONE:
            return written
        paths = [os.path.dirname(self.path(write.key)) for write, _ in writes]
        errors = {path: self._sync_names(path) for path in set(paths)}
        return [
            one._replace(error=errors[path]) if one.stored is Stored.STORED else one
            for path, one in zip(paths, written, strict=True)
        ]

    def _stage(self, write: Write, epoch: int, scratch: Scratch) -> Staged | Written:
        data, path = self.files.data, self.temporary_path
        octets = scratch.take(header_nbytes(len(write.sizes)))
        payload = self.records.make(write, epoch, octets)
        try:
            if self.files.names.free_nbytes(self.root) < self.min_free_nbytes + octets.nbytes + payload.nbytes:
                return Written(Stored.REFUSED, error=errno.ENOSPC)
            fd = data.open(path, create=True, direct=self.direct and is_aligned(payload))
        except OSError as error:
            return Written(Stored.REFUSED, error=error.errno or errno.EIO, left=not self._unlinked(path))
        try:
            write_all(data, fd, [octets, payload])
        except OSError as error:
            return self._dropped(Staged(path, fd, write, epoch), error.errno or errno.EIO)
        return Staged(path, fd, write, epoch)

    def _synced(self, staged: Sequence[Staged | Written]) -> list[Staged | Written]:
        """The same once the files are durable, where they are to be."""
        if self.durability is Durability.NONE:
            return list(staged)
        synced: list[Staged | Written] = []
        for one in staged:
            if isinstance(one, Staged):
                try:
                    self.files.data.sync(one.fd)
                except OSError as error:
                    synced.append(self._dropped(one, error.errno or errno.EIO))
                    continue
            synced.append(one)
        return synced

    def _publish(self, staged: Staged, scratch: Scratch) -> Written:
        """Give a record its name; a good one that has it already is kept, a bad one makes room."""
        try:
            nbytes = self.files.data.stat(staged.fd).allocated_nbytes
            if not self._named(staged):
                there = self.is_good(staged.write, staged.epoch, scratch)
                if there is not None:
                    return self._dropped(staged, 0)._replace(stored=Stored.PRESENT, nbytes=there.allocated_nbytes)
                self.files.names.unlink(self.path(staged.write.key))
                if not self._named(staged):
                    return self._dropped(staged, errno.EEXIST)
        except OSError as error:
            return self._dropped(staged, error.errno or errno.EIO)
        self.files.data.close(staged.fd)
        return Written(Stored.STORED, nbytes)

    def _named(self, staged: Staged) -> bool:
        """Whether the record has its name now; False: another file has it."""
        if self.is_closed():
            raise OSError(errno.ESHUTDOWN, "the tier was closed while it wrote")
        path = self.path(staged.write.key)
        for _ in range(_TRIES):
            try:
                self.files.names.publish(staged.path, path)
            except FileExistsError:
                return False
            except FileNotFoundError:  # its directory is not there yet, or was empty and has just been removed
                self._ensure(os.path.dirname(path))
            else:
                return True
        raise FileNotFoundError(errno.ENOENT, "its directory goes again and again", path)

    def _ensure(self, path: str) -> None:
        with suppress(FileNotFoundError):  # its parent has just been removed
            self.files.names.mkdir(path)

    def _dropped(self, staged: Staged, error: int) -> Written:
        left = not self._unlinked(staged.path)
        self.files.data.close(staged.fd)
        return Written(Stored.REFUSED, 0, error, left)

    def _sync_names(self, path: str) -> int:
        """Make the names in a directory durable, and its own and its parent's; the error, 0 for none."""
        try:
            for one in (path, os.path.dirname(path), self.root):
                sync_directory(self.files, one)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    # ---- names

    def delete(self, keys: Sequence[tuple[bytes, Inode | None]]) -> list[int]:
        """Remove records, where an inode is named only that file.

        The bytes that each one's file took, 0 where there was none (of that inode), -1 where it is still there.
        """
        return [self._deleted(self.path(key), inode) for key, inode in keys]

    def _deleted(self, path: str, inode: Inode | None) -> int:
        try:
            stat = self.files.data.stat(path)
        except OSError as error:
            return 0 if error.errno in (errno.ENOENT, errno.ENOTDIR) else -1
        if inode is not None and stat.inode != inode:
            return 0
        return stat.allocated_nbytes if self._unlinked(path) else -1

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """What the files of records take now; 0 where there is none. OSError where one cannot be looked at."""
        sizes = []
        for key in keys:
            try:
                sizes.append(self.files.data.stat(self.path(key)).allocated_nbytes)
            except FileNotFoundError:
                sizes.append(0)
        return sizes

    def _unlinked(self, path: str) -> bool:
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
        """What the file system has left for us beyond what is to stay free."""
        return self.files.names.free_nbytes(self.root) - self.min_free_nbytes
