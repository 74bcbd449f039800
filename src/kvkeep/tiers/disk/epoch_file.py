"""The file `epochs` of a directory: read at the start, replaced at each clear, also on a disk that is full by then.

Runs in an I/O thread. The room for the next one is taken beforehand: `epochs.next`, held open, is written in place and
then renamed. Knows nothing about records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvkeep.core.layout import padded_nbytes
from kvkeep.errors import CorruptChunk
from kvkeep.tiers.disk.directio import put_durably, read_small, unlink_quietly, write_all, write_durably
from kvkeep.tiers.disk.files import Shelf
from kvkeep.tiers.epochs import VERSION, Epochs, decode_epochs, encode_epochs, first_epochs

MAX_NBYTES = 1 << 20
_GROWTH_NBYTES = 2048  # what a few clears add


class Spare(NamedTuple):
    """`epochs.next`, open to be written, and how long it is."""

    fd: int
    nbytes: int


@dataclass(eq=False)
class EpochFile:
    """One directory's; one thread at a time may call it."""

    shelf: Shelf
    found_version: int = VERSION  # that of the records which were there before
    _spare: Spare | None = None

    def read(self, now_ns: int) -> Epochs:
        """The directory's epochs; where there are none that can be read, new ones, and all that is there is old.

        All is old too where an earlier version of kvkeep wrote here: the epochs of now are then those after a clear.
        """
        octets = read_small(self.shelf.files, f"{self.shelf.root}/epochs", MAX_NBYTES)
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
        files, path = self.shelf.files, f"{self.shelf.root}/epochs"
        octets = encode_epochs(epochs)
        spare, self._spare = self._spare, None
        if spare is not None and len(octets) <= spare.nbytes:
            put_durably(files, spare.fd, self._next_path, path, encode_epochs(epochs, spare.nbytes))
        else:
            self._drop(spare)
            write_durably(files, self.shelf.state_path, path, octets)
        self._take_room(len(octets))

    @property
    def _next_path(self) -> str:
        return f"{self.shelf.root}/epochs.next"

    def close(self) -> None:
        """Give back the room that was taken for the next one."""
        spare, self._spare = self._spare, None
        self._drop(spare)

    def _take_room(self, nbytes: int) -> None:
        """Takes the blocks and the name that the next epochs need; without them those are written like any file."""
        data, wanted = self.shelf.files.data, padded_nbytes(nbytes + _GROWTH_NBYTES)
        unlink_quietly(self.shelf.files, self._next_path)  # of an earlier boot that was killed
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
            unlink_quietly(self.shelf.files, self._next_path)
            self.shelf.files.data.close(spare.fd)
