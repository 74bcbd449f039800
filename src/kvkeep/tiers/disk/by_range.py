"""Records without a codec, read by their ranges: the first ranges of a whole batch before the later ones of any.

Runs in an I/O thread, like `files`. Each piece is verified as soon as it has been read, and whoever waits is told; an
error of one record is that record's answer. Knows nothing about limits, order of use, or who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.units import SUM_NBYTES
from kvkeep.tiers.disk.directio import read_all
from kvkeep.tiers.disk.files import Loaded, Shelf, Verdict
from kvkeep.tiers.disk.threads import Scratch
from kvkeep.tiers.record import first_bad_range, header_nbytes, record_nbytes
from kvkeep.tiers.tier import Read

PIECE_NBYTES = 128 << 10  # smaller ranges are read together: less than this takes a device about as long


class Piece(NamedTuple):
    """Ranges [first, end) of a chunk, and where they are in its payload (bytes)."""

    first: int
    end: int
    start_nbytes: int
    end_nbytes: int


def pieces(sizes: Sequence[int]) -> list[Piece]:
    """The ranges of a chunk in the pieces in which they are read."""
    cut: list[Piece] = []
    first = start = at = 0
    for number, size in enumerate(sizes, 1):
        at += size
        if at - start >= PIECE_NBYTES or number == len(sizes):
            cut.append(Piece(first, number, start, at))
            first, start = number, at
    return cut


@dataclass
class _Reading:
    """A record that is being read: its file, the sums that its header promises; `over` is what became of it."""

    read: Read
    epoch: int
    fd: int
    pieces: list[Piece]
    sums: bytes = b""
    over: Loaded | None = None
    loaded: Loaded = field(default=Loaded(Verdict.BAD))

    def go_on(self, shelf: Shelf, number: int, scratch: Scratch) -> None:
        """Reads its next piece."""
        try:
            good = self._begin(shelf, scratch) if not number else self._continue(shelf, self.pieces[number])
        except OSError:
            self.over = Loaded(Verdict.FAILED)
            return
        if not good:
            self.over = self.loaded
            return
        assert self.read.arrived is not None, "a read that wants no ranges"
        self.read.arrived(self.pieces[number].end)
        if number == len(self.pieces) - 1:
            self.over = self.loaded._replace(verdict=Verdict.GOOD, sums=self.sums)

    def _begin(self, shelf: Shelf, scratch: Scratch) -> bool:
        """Reads the header with the first piece; whether it is the header of what is read, and the piece is good."""
        data, piece = shelf.files.data, self.pieces[0]
        stat = data.stat(self.fd)
        self.loaded = Loaded(Verdict.BAD, b"", stat)
        if not stat.is_file or stat.nbytes != record_nbytes(self.read.sizes):
            return False
        header = scratch.take(header_nbytes(len(self.read.sizes)))
        wanted = header.nbytes + piece.end_nbytes
        if read_all(data, self.fd, [header, self.read.into[: piece.end_nbytes]]) != wanted:
            return False
        found = shelf.records.header_of(header, self.read, self.epoch)
        self.sums = found.raw_sums if found is not None else b""
        return found is not None and self._holds(piece)

    def _continue(self, shelf: Shelf, piece: Piece) -> bool:
        into = self.read.into[piece.start_nbytes : piece.end_nbytes]
        start = header_nbytes(len(self.read.sizes)) + piece.start_nbytes
        return read_all(shelf.files.data, self.fd, [into], start) == into.nbytes and self._holds(piece)

    def _holds(self, piece: Piece) -> bool:
        sums = self.sums[piece.first * SUM_NBYTES : piece.end * SUM_NBYTES]
        payload = self.read.into[piece.start_nbytes : piece.end_nbytes]
        return first_bad_range(payload, self.read.sizes[piece.first : piece.end], sums) is None


def load_by_range(shelf: Shelf, reads: Sequence[tuple[Read, int]], scratch: Scratch) -> list[Loaded]:
    """Read records, each of the epoch beside it, piece by piece in turn; tells their `arrived` of each that is good."""
    readings = [_opened(shelf, read, epoch) for read, epoch in reads]
    try:
        for number in range(max([len(one.pieces) for one in readings], default=0)):
            for one in readings:
                if one.over is None:
                    one.go_on(shelf, number, scratch)
    finally:
        for one in readings:
            if one.fd >= 0:
                shelf.files.data.close(one.fd)
    return [one.over or one.loaded for one in readings]


def _opened(shelf: Shelf, read: Read, epoch: int) -> _Reading:
    fd = shelf.opened(read)
    if isinstance(fd, Loaded):
        return _Reading(read, epoch, -1, [], over=fd)
    return _Reading(read, epoch, fd, pieces(read.sizes))
