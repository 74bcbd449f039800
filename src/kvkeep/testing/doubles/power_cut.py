"""Plays a power cut: of a directory only what was made durable is left.

It stands between the disk tier and a `FaultyDisk`. Knows nothing about records.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvkeep.testing.doubles.faulty_files import FaultyDisk, is_record, record_paths
from kvkeep.tiers.disk.directio import Files, Inode, Name, Stat
from kvkeep.tiers.tier import Bytes


@dataclass(eq=False)
class PowerCut:
    """Directory names and file contents as a power cut leaves them: what was not synced is as it was before.

    `files` is what a tier takes. Backups lie in `shadow`, a directory on the same file system.
    """

    disk: FaultyDisk
    shadow: str
    _undo: list[tuple[str, Callable[[], None]]] = field(default_factory=list)  # (directory, how to undo)
    _unsynced: dict[Inode, str] = field(default_factory=dict)

    @property
    def files(self) -> Files:
        """What a tier takes."""
        return Files(_SyncedData(self), _SyncedNames(self))

    def cut(self) -> None:
        """Takes back what was not made durable; whoever still runs has no effect any more."""
        self.disk.kill_at = 0
        for _, undo in reversed(self._undo):
            undo()
        for inode, root in self._unsynced.items():
            for path in record_paths(root):
                if self.disk.real.data.stat(path).inode == inode:
                    with open(path, "r+b") as file:
                        file.write(bytes(os.path.getsize(path)))

    def kept(self, path: str) -> str | None:
        """A backup of a file under another name; None if there is none."""
        backup = f"{self.shadow}/{len(os.listdir(self.shadow))}"
        try:
            os.link(path, backup)
        except FileNotFoundError:
            return None
        return backup

    def note(self, path: str, backup: str | None) -> None:
        """The name `path` has changed; `backup` is what it named before."""

        def undo() -> None:
            if os.path.lexists(path):
                os.unlink(path)
            if backup is not None:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                shutil.copy2(backup, path)

        self._undo.append((os.path.dirname(path), undo))

    def synced(self, path: str, inode: Inode) -> None:
        """A file's content, or a directory's names, are durable."""
        self._unsynced.pop(inode, None)
        self._undo = [step for step in self._undo if step[0] != path]

    def wrote(self, path: str, inode: Inode) -> None:
        """A file's content is not durable."""
        if is_record(path):
            self._unsynced[inode] = path.rpartition("/new/")[0]


class _SyncedData:
    def __init__(self, power: PowerCut) -> None:
        self._power = power
        self._inner = power.disk

    def open(self, path: str, create: bool, direct: bool) -> int:
        return self._inner.open(path, create, direct)

    def close(self, fd: int) -> None:
        self._inner.close(fd)

    def stat(self, file: int | str) -> Stat:
        return self._inner.stat(file)

    def readv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        return self._inner.readv(fd, buffers, offset)

    def writev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        done = self._inner.writev(fd, buffers, offset)
        self._power.wrote(self._inner.paths[fd], self._inner.real.data.stat(fd).inode)
        return done

    def sync(self, fd: int) -> None:
        self._inner.sync(fd)
        self._power.synced(self._inner.paths[fd], self._inner.real.data.stat(fd).inode)


class _SyncedNames:
    def __init__(self, power: PowerCut) -> None:
        self._power = power
        self._inner = power.disk

    def publish(self, temporary: str, path: str) -> None:
        self._inner.publish(temporary, path)
        self._power.note(path, None)

    def replace(self, temporary: str, path: str) -> None:
        backup = self._power.kept(path)
        self._inner.replace(temporary, path)
        self._power.note(path, backup)

    def unlink(self, path: str) -> None:
        if os.path.isdir(path):  # an empty one: `undo` makes it again where it is missed
            self._inner.unlink(path)
            return
        backup = self._power.kept(path)
        self._inner.unlink(path)
        self._power.note(path, backup)

    def mkdir(self, path: str) -> None:
        self._inner.mkdir(path)

    def scan(self, path: str) -> Iterator[Name]:
        return self._inner.scan(path)

    def free_nbytes(self, path: str) -> int:
        return self._inner.free_nbytes(path)
