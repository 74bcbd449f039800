"""The file `epochs` of a directory: read at the start, replaced at each clear, also when the disk is full by then.

Runs in an I/O thread. The room for the next epochs is taken beforehand: `epochs.next` is open, is written in place
and then renamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvkeep.core.layout import padded_nbytes
from kvkeep.errors import CorruptChunk
from kvkeep.tiers.disk.directio import put_durably, read_small, unlink_quietly, write_all, write_durably
from kvkeep.tiers.disk.files import RecordFiles
from kvkeep.tiers.epochs import VERSION, Epochs, decode_epochs, encode_epochs, first_epochs

MAX_NBYTES = 1 << 20
_GROWTH_NBYTES = 2048  # what a few clears add


class Spare(NamedTuple):
    """`epochs.next`, open to be written, and how long it is."""

    fd: int
    nbytes: int


@dataclass(eq=False)
class EpochFile:
    """The epochs of one directory; one thread at a time may call it."""

    record_files: RecordFiles
    found_version: int = VERSION  # the format of the records that were there at the start
    _spare: Spare | None = None

    def read(self, now_ns: int) -> Epochs:
        """The directory's epochs. Where none can be read they are new, and every record there is old.

        So is every record of an earlier format: then these are the epochs after a clear of everything.
        """
        octets = read_small(self.record_files.files, f"{self.record_files.root}/epochs", MAX_NBYTES)
        try:
            epochs = decode_epochs(octets or b"")
        except CorruptChunk:
            epochs = first_epochs(now_ns)
            self.write(epochs)
            return epochs
        self.found_version = epochs.version
        if epochs.version != VERSION:
            epochs = epochs.raised(None, now_ns)
            self.write(epochs)
        else:
            self._take_room(len(encode_epochs(epochs)))
        return epochs

    def write(self, epochs: Epochs) -> None:
        """Make the epochs durable; OSError where that is not certain."""
        files, path = self.record_files.files, f"{self.record_files.root}/epochs"
        octets = encode_epochs(epochs)
        spare, self._spare = self._spare, None
        if spare is not None and len(octets) <= spare.nbytes:
            put_durably(files, spare.fd, self._next_path, path, octets=encode_epochs(epochs, spare.nbytes))
        else:
            self._drop(spare)
            write_durably(files, self.record_files.state_path, path, octets)
        self._take_room(len(octets))

    @property
    def _next_path(self) -> str:
        return f"{self.record_files.root}/epochs.next"

    def close(self) -> None:
        """Give back the room that was taken for the next epochs."""
        spare, self._spare = self._spare, None
        self._drop(spare)

    def _take_room(self, nbytes: int) -> None:
        """Take the blocks and the name that the next epochs need; where that fails they are written like any file."""
        data, wanted = self.record_files.files.data, padded_nbytes(nbytes + _GROWTH_NBYTES)
        unlink_quietly(self.record_files.files, self._next_path)  # of an earlier run that was killed
        try:
            spare = Spare(data.open(self._next_path, create=True, direct=False), wanted)
        except OSError:
            return
        try:
            write_all(data, spare.fd, [np.zeros(wanted, np.uint8)])
        except OSError:
            self._drop(spare)
        else:
            self._spare = spare

    def _drop(self, spare: Spare | None) -> None:
        if spare is not None:
            unlink_quietly(self.record_files.files, self._next_path)
            self.record_files.files.data.close(spare.fd)
