"""Makes and verifies records: the only code that turns a chunk into the bytes that a place keeps, and back.

Memory in, memory out. Whoever has the bytes' place (`disk/files.py`, `record_tier.py`) does the reading and writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from kvkeep.core.layout import padded_nbytes
from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.errors import CorruptChunk, TierError
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.codec import RAW, Codec
from kvkeep.tiers.record import (
    Header,
    decode_header,
    encode_header,
    first_bad_range,
    header_nbytes,
    raw_header,
    record_nbytes,
)
from kvkeep.tiers.tier import Bytes, Read, Write


class Records(NamedTuple):
    """Makes and verifies the records of one tier. Without a codec the payload is read and written where it is."""

    codec: Codec | None = None

    @property
    def codec_id(self) -> int:
        """The codec that records of this tier have; one of another codec is none of its records."""
        return RAW if self.codec is None else self.codec.codec_id

    def most_nbytes(self, sizes: Sequence[int]) -> int:
        """The most bytes that the record of a chunk with ranges of these sizes can take."""
        return record_nbytes(sizes if self.codec is None else [self.codec.most_nbytes(size) for size in sizes])

    def make(self, write: Write, epoch: int, octets: Bytes) -> Bytes:
        """Write the header of a record into `octets`, uint8 [header_nbytes]; the payload that follows it."""
        if self.codec is None:
            encode_header(raw_header(write.key, epoch, write.sizes, write.sums, tokens=write.tokens), octets)
            return write.payload
        seal = self.codec.seal()
        ranges = enumerate(_ranges(write.payload, write.sizes))
        encoded = [self.codec.encode(range_, index, seal) for index, range_ in ranges]
        sizes = tuple([len(part) for part in encoded])
        payload = aligned_bytes(sum([padded_nbytes(size) for size in sizes]))
        padded = _ranges(payload, sizes)
        for range_, part in zip(padded, encoded, strict=True):
            range_[: len(part)] = np.frombuffer(part, np.uint8)
        sums = b"".join([xxhash.xxh3_128_digest(range_.data) for range_ in padded])
        header = raw_header(write.key, epoch, write.sizes, write.sums, tokens=write.tokens)
        encode_header(header._replace(sizes=sizes, sums=sums, codec=self.codec.codec_id, seal=seal), octets)
        return payload

    def payload_memory(self, read: Read, nbytes: int) -> Bytes | None:
        """Memory for a payload of so many bytes, from which the chunk is decoded; None: it cannot be this chunk's."""
        if self.codec is None:
            return read.into if nbytes == sum(read.sizes) else None
        most_nbytes = self.most_nbytes(read.sizes) - header_nbytes(len(read.sizes))
        return aligned_bytes(nbytes) if 0 < nbytes <= most_nbytes and not nbytes % ALIGN_NBYTES else None

    def verify(self, octets: Bytes, payload: Bytes, read: Read, epoch: int) -> bytes | None:
        """The chunk's sums, once every byte of its record has proven right and it stands decoded in `read.into`.

        None: header or payload are not those of this chunk in this epoch, and `read.into` may hold anything.
        """
        header = self.header_of(octets, read, epoch)
        if header is None or header.nbytes != octets.nbytes + payload.nbytes:
            return None
        if first_bad_range(payload, header.sizes, header.sums) is not None:
            return None
        if self.codec is not None and not self._decode(header, payload, read):
            return None
        return header.raw_sums

    def header_of(self, octets: Bytes, chunk: Read | Write, epoch: int) -> Header | None:
        """The header in `octets` if it is that of this chunk in this epoch, as far as a header tells."""
        try:
            header = decode_header(octets)
        except CorruptChunk:
            return None
        wanted = (chunk.key, epoch, self.codec_id, tuple(chunk.sizes))
        return header if (header.key, header.epoch, header.codec, header.raw_sizes) == wanted else None

    def _decode(self, header: Header, payload: Bytes, read: Read) -> bool:
        assert self.codec is not None, "raw ranges are where they belong already"
        stored = _ranges(payload, header.sizes)
        try:
            for index, into in enumerate(_ranges(read.into, read.sizes)):
                self.codec.decode(stored[index][: header.sizes[index]], index, header.seal, into)
        except CorruptChunk:
            return False
        return first_bad_range(read.into, header.raw_sizes, header.raw_sums) is None


RAW_RECORDS = Records()


def check_payloads(writes: Sequence[Write]) -> None:
    """Raise TierError where a payload is not as long as its ranges."""
    for write in writes:
        if write.payload.nbytes != sum(write.sizes):
            raise TierError(f"a chunk of {write.payload.nbytes} bytes cannot have ranges of {write.sizes} bytes")


def _ranges(payload: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """The ranges of a payload, each with its padding."""
    ends = list(accumulate([padded_nbytes(size) for size in sizes], initial=0))
    return [payload[start:end] for start, end in pairwise(ends)]
