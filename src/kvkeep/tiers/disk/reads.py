"""Reads records of one directory into memory that the caller lends, and verifies them.

Until the start-up scan has ended, a key that the ledger does not know is tried: the last run may have left its record.

A record without a codec can be read range by range, the first ranges of a whole batch before the later ranges of any
chunk: an engine that loads layer by layer begins with the first layer of all its chunks while the others are read. Each
piece is verified as soon as it has been read, and then reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvkeep.core.units import NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.tiers.disk.directio import Inode, read_all
from kvkeep.tiers.disk.files import ReadResult, RecordFiles, Verdict
from kvkeep.tiers.disk.ledger import LedgerEntry
from kvkeep.tiers.disk.state import DiskState, Errand, batches
from kvkeep.tiers.disk.threads import Scratch, Urgency
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


class WantedRead(NamedTuple):
    """A read, and where its answer goes."""

    answer: int
    read: Read


class BegunRead(NamedTuple):
    """A read that a thread carries out: the epoch that its record must carry, its ledger entry if there is one."""

    answer: int
    read: Read
    epoch: int
    entry: LedgerEntry | None


@dataclass(eq=False)
class DiskReads:
    """The reads of one directory."""

    state: DiskState
    _guesses: set[asyncio.Task[None]] = field(default_factory=set)  # reads of keys that the ledger does not know

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are here as far as is known; the policy learns the first that is not."""
        answers = [key in self.state.ledger.live for key in keys]
        unknown = [index for index, key in enumerate(keys) if not answers[index] and self._may_be_there(key)]
        if unknown:
            asked = [keys[index] for index in unknown]
            job = self.state.threads.submit(Urgency.READ, lambda _: self.state.record_files.present(asked))
            for index, is_there in zip(unknown, await job.done or [], strict=False):
                answers[index] = is_there
        if False in answers:
            self.state.ledger.missed(keys[answers.index(False)])
        return answers

    async def load(self, reads: Sequence[Read]) -> list[bytes | None]:
        """Fill the memory of each read; its sums, or None."""
        answers: list[bytes | None] = [None] * len(reads)
        whole: list[WantedRead] = []
        by_range: list[WantedRead] = []
        for index, read in enumerate(reads):
            if read.key in self.state.ledger.live or self._may_be_there(read.key):
                (whole if read.arrived is None else by_range).append(WantedRead(index, read))
            else:
                self._note_miss(read)
        options = self.state.options
        runs = batches(whole, lambda wanted: record_nbytes(wanted.read.sizes), options.read_batch)
        runs += _deal(by_range, options.threads)
        await self.state.end([self.state.begin(partial(self._load, run, answers)) for run in runs])
        return answers

    async def wait_for_guesses(self) -> None:
        """Wait until no read of an unknown key is under way."""
        while self._guesses:
            await asyncio.wait(self._guesses)

    def _note_miss(self, read: Read) -> None:
        self.state.counts.misses += 1
        if read.gone is not None:
            read.gone()

    def _may_be_there(self, key: bytes) -> bool:
        """Whether a key without an entry may have a record of an earlier run."""
        state = self.state
        if state.complete or key in state.ledger.gone or key in state.ledger.dying:
            return False
        return not state.epochs.is_unsettled(key[:NAMESPACE_NBYTES])

    async def _load(self, run: Sequence[WantedRead], answers: list[bytes | None], errand: Errand) -> None:
        state, begun = self.state, self._begin(run, errand)
        by_range = run[0].read.arrived is not None and state.record_files.records.codec is None
        read = partial(read_by_range, state.record_files) if by_range else state.record_files.read
        errand.job = state.threads.submit(Urgency.READ, partial(read, [(asked.read, asked.epoch) for asked in begun]))
        results: list[ReadResult] | None = None
        try:
            results = await errand.job.done
        finally:
            for asked in begun:
                if asked.entry is not None:
                    state.ledger.unpin(asked.entry)
        if results is None:
            state.counts.shed += len(begun)
            return
        bad: list[tuple[LedgerEntry, Inode | None]] = []
        for asked, result in zip(begun, results, strict=True):
            answers[asked.answer] = self._answer(asked, result, bad)
        await state.remove_files(bad)

    def _begin(self, run: Sequence[WantedRead], errand: Errand) -> list[BegunRead]:
        """Pin what is still there; a read whose record has gone meanwhile is a miss."""
        begun: list[BegunRead] = []
        for answer, read in run:
            entry = self.state.ledger.live.get(read.key)
            if entry is not None:
                self.state.ledger.pin(entry)
            elif not self._may_be_there(read.key):
                self._note_miss(read)
                continue
            begun.append(BegunRead(answer, read, self.state.epoch(read.key), entry))
        task = errand.task
        if task is not None and any(asked.entry is None for asked in begun):
            self._guesses.add(task)
            task.add_done_callback(self._guesses.discard)
        return begun

    def _answer(
        self, asked: BegunRead, result: ReadResult, bad: list[tuple[LedgerEntry, Inode | None]]
    ) -> bytes | None:
        """The sums of a good record that is still of its epoch; a bad record joins `bad`."""
        state, key = self.state, asked.read.key
        if result.verdict is Verdict.GOOD and state.epoch(key) == asked.epoch:
            self._note_use(asked, result)
            state.counts.hits += 1
            return result.sums
        if result.verdict in (Verdict.ABSENT, Verdict.GOOD):  # a good record has been cleared meanwhile
            self._note_miss(asked.read)
        else:
            state.counts.misses += 1
        if result.verdict is Verdict.FAILED:
            state.note_failure("a record cannot be read")
            if (known := state.ledger.live.get(key)) is not None:
                known.unreadable = True  # it stays, for a device that comes back, until the chunk is written again
        elif result.verdict is Verdict.BAD:
            state.counts.corrupt += 1
            if (entry := self._kill(asked)) is not None:
                bad.append((entry, result.stat.inode if result.stat else None))
        elif result.verdict is Verdict.ABSENT and asked.entry is not None and (entry := self._kill(asked)) is not None:
            state.ledger.forget(entry, 0)
        return None

    def _note_use(self, asked: BegunRead, result: ReadResult) -> None:
        ledger, key = self.state.ledger, asked.read.key
        if key in ledger.live:
            ledger.touch(ledger.live[key])
            ledger.live[key].unreadable = False
        elif (
            asked.entry is None
            and result.stat is not None
            and self._may_be_there(key)
            and key not in self.state.writing
        ):
            ledger.learn(key, result.stat.allocated_nbytes)

    def _kill(self, asked: BegunRead) -> LedgerEntry | None:
        """The record's entry, now dying; None if it has ended already, or is about to be replaced."""
        ledger, key = self.state.ledger, asked.read.key
        if asked.entry is not None:
            return ledger.kill(asked.entry) if ledger.live.get(key) is asked.entry else None
        if key in ledger.live or key in ledger.dying or key in self.state.writing:
            return None
        return ledger.kill_unknown(key)


def _deal(reads: Sequence[WantedRead], threads: int) -> list[list[WantedRead]]:
    """Reads dealt out in turn to as many runs as there are threads, so that the first ranges of all come together."""
    return [list(reads[first::threads]) for first in range(min(threads, len(reads)))]
