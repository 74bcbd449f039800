"""What others do to a store's disk while it runs: they remove records, cut them, put fifos and directories in their place.

Reads of some records stop for a while (`stopping_store.py`). At the end the disk must be within its limit, and in use.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvkeep.testing.doubles.faulty_files import is_record

LIMIT_NBYTES = 4 << 20
SIDE_FILES = ("order", "identities.json")  # hints, without which all goes on; not lock and epochs, which decide


@dataclass
class DiskTrouble:
    """Trouble for the store in `folder`/disk."""

    folder: Path

    @property
    def flag(self) -> Path:
        """What stops reads, while it is there."""
        return self.folder / "stopped"

    def records(self) -> list[Path]:
        """The files of all records, whatever kind of file they are now."""
        return [path for path in self.folder.glob("disk/*/*/*") if len(path.name) == 64]

    def strike(self, rng: random.Random) -> str:
        """Does one thing; what it was."""
        kinds: dict[str, Callable[[random.Random], None]] = {
            "records removed": lambda rng: self._each(rng, _remove),
            "records cut": lambda rng: self._each(rng, _cut),
            "records are fifos": lambda rng: self._each(rng, _fifo),
            "records are directories": lambda rng: self._each(rng, _directory),
            "side files are fifos": self._side_files,
            "folders removed": self._folders,
            "reads stop or go on": self._reads,
        }
        kind = rng.choice(list(kinds))
        kinds[kind](rng)
        return kind

    def end(self) -> None:
        """Reads go on."""
        self.flag.unlink(missing_ok=True)

    def nbytes(self) -> int:
        """What the records take on the disk."""
        files = [path for path in self.folder.glob("disk/**/*") if path.is_file() and is_record(str(path))]
        return sum(path.lstat().st_blocks * 512 for path in files)

    def _each(self, rng: random.Random, act: Callable[[Path], None]) -> None:
        share = rng.choice((0.02, 0.2, 0.9))
        for path in self.records():
            if rng.random() < share:
                with suppress(OSError):  # the store has removed it, or made it anew
                    act(path)

    def _side_files(self, rng: random.Random) -> None:
        path = self.folder / "disk" / rng.choice(SIDE_FILES)
        with suppress(OSError):
            path.unlink(missing_ok=True)
            os.mkfifo(path)

    def _folders(self, rng: random.Random) -> None:
        for path in self.folder.glob("disk/*/*"):
            if path.parent.name != "new" and rng.random() < 0.1:
                shutil.rmtree(path, ignore_errors=True)

    def _reads(self, rng: random.Random) -> None:
        if self.flag.exists():
            self.flag.unlink()
        else:
            fresh = self.flag.with_suffix(".fresh")
            fresh.write_text("".join(rng.sample("0123456789abcdef", rng.choice((1, 8, 16)))))
            fresh.rename(self.flag)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cut(path: Path) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def _fifo(path: Path) -> None:
    _remove(path)
    os.mkfifo(path)


def _directory(path: Path) -> None:
    _remove(path)
    path.mkdir()
