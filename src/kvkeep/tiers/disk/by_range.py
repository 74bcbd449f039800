"""Reads records without a codec range by range: the first ranges of a whole batch before the later ranges of any chunk.

An engine that loads layer by layer can begin with the first layer of all its chunks while the others are still read.
Runs in an I/O thread, like `files`. Each piece is verified as soon as it has been read, and then reported; an error of
one record is the answer for that record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.core.units import SUM_NBYTES
from kvkeep.tiers.disk.directio import read_all
from kvkeep.tiers.disk.files import ReadResult, RecordFiles, Verdict
from kvkeep.tiers.disk.threads import Scratch
from kvkeep.tiers.record import first_bad_range, header_nbytes, record_nbytes
from kvkeep.tiers.tier import Read

PIECE_NBYTES = 128 << 10  # smaller ranges are read together: a device takes about as long for less


class Piece(NamedTuple):
    """Ranges [first, end) of a chunk, and where they are in its payload (bytes)."""

    first: int
    end: int
    start_nbytes: int
    end_nbytes: int


def pieces(sizes: Sequence[int]) -> list[Piece]:
    """The ranges of a chunk in the pieces in which they are read."""
    cut: list[Piece] = []
    first = start_nbytes = end_nbytes = 0
    for end, size in enumerate(sizes, 1):
        end_nbytes += size
        if end_nbytes - start_nbytes >= PIECE_NBYTES or end == len(sizes):
            cut.append(Piece(first, end, start_nbytes, end_nbytes))
            first, start_nbytes = end, end_nbytes
    return cut


@dataclass
class _RangeRead:
    """A record that is being read: its open file, its pieces, the sums in its header; `result` once it has ended."""

    read: Read
    epoch: int
    fd: int
    pieces: list[Piece]
    sums: bytes = b""
    result: ReadResult | None = None
    bad: ReadResult = field(default=ReadResult(Verdict.BAD))  # the result if the next piece is not good

    def read_piece(self, record_files: RecordFiles, index: int, scratch: Scratch) -> None:
        """Read and verify a piece, and report it if it is good; otherwise, or after the last piece, set `result`."""
        piece = self.pieces[index]
        try:
            good = self._read_later(record_files, piece) if index else self._read_first(record_files, piece, scratch)
        except OSError:
            self.result = ReadResult(Verdict.FAILED)
            return
        if not good:
            self.result = self.bad
            return
        assert self.read.arrived is not None, "a read that wants no ranges"
        self.read.arrived(piece.end)
        if piece is self.pieces[-1]:
            self.result = self.bad._replace(verdict=Verdict.GOOD, sums=self.sums)

    def _read_first(self, record_files: RecordFiles, piece: Piece, scratch: Scratch) -> bool:
        """Read the header with the first piece; whether both are right."""
        data = record_files.files.data
        stat = data.stat(self.fd)
        self.bad = ReadResult(Verdict.BAD, b"", stat)
        if not stat.is_file or stat.nbytes != record_nbytes(self.read.sizes):
            return False
        octets = scratch.take(header_nbytes(len(self.read.sizes)))
        wanted_nbytes = octets.nbytes + piece.end_nbytes
        if read_all(data, self.fd, [octets, self.read.into[: piece.end_nbytes]]) != wanted_nbytes:
            return False
        header = record_files.records.header_of(octets, self.read, self.epoch)
        self.sums = header.raw_sums if header is not None else b""
        return header is not None and self._is_good(piece)

    def _read_later(self, record_files: RecordFiles, piece: Piece) -> bool:
        into = self.read.into[piece.start_nbytes : piece.end_nbytes]
        start = header_nbytes(len(self.read.sizes)) + piece.start_nbytes
        return read_all(record_files.files.data, self.fd, [into], start) == into.nbytes and self._is_good(piece)

    def _is_good(self, piece: Piece) -> bool:
        sums = self.sums[piece.first * SUM_NBYTES : piece.end * SUM_NBYTES]
        payload = self.read.into[piece.start_nbytes : piece.end_nbytes]
        return first_bad_range(payload, self.read.sizes[piece.first : piece.end], sums) is None


def read_by_range(record_files: RecordFiles, reads: Sequence[tuple[Read, int]], scratch: Scratch) -> list[ReadResult]:
    """Read records, each of the epoch beside it, piece by piece in turn; calls `arrived` after each good piece."""
    range_reads = [_open(record_files, read, epoch) for read, epoch in reads]
    try:
        for index in range(max([len(range_read.pieces) for range_read in range_reads], default=0)):
            for range_read in range_reads:
                if range_read.result is None:
                    range_read.read_piece(record_files, index, scratch)
    finally:
        for range_read in range_reads:
            if range_read.fd >= 0:
                record_files.files.data.close(range_read.fd)
    return [range_read.result or range_read.bad for range_read in range_reads]


def _open(record_files: RecordFiles, read: Read, epoch: int) -> _RangeRead:
    fd = record_files.open_record(read)
    if isinstance(fd, ReadResult):
        return _RangeRead(read, epoch, -1, [], result=fd)
    return _RangeRead(read, epoch, fd, pieces(read.sizes))
