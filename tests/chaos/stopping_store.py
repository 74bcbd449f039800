"""A store whose reads of some records stop: `stopping_store.py FLAG ...`, the rest as `python -m kvkeep.store`.

While the file FLAG is there, reads of records whose digest begins with one of the hex digits in it wait. They go on when
it is gone. All else is the real thing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import kvkeep.tiers.disk.disk
from kvkeep.store.__main__ import main
from kvkeep.tiers.disk.directio import Files, PosixDescriptors, PosixNames
from kvkeep.tiers.tier import Bytes

LOOK_S = 0.01
DIGEST_HEX = 64  # the name of a record


class StoppingDescriptors(PosixDescriptors):
    """The kernel's calls, but for reads that `flag` stops."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def readv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """As `Descriptors.readv`."""
        while self._stops(os.readlink(f"/proc/self/fd/{fd}")):
            time.sleep(LOOK_S)
        return super().readv(fd, buffers, offset)

    def _stops(self, path: str) -> bool:
        name = os.path.basename(path)
        try:
            return len(name) == DIGEST_HEX and name[0] in self.flag.read_text()
        except FileNotFoundError:
            return False


if __name__ == "__main__":
    kvkeep.tiers.disk.disk.posix_files = lambda: Files(StoppingDescriptors(Path(sys.argv[1])), PosixNames())  # type: ignore[attr-defined]
    sys.exit(main(sys.argv[2:]))
