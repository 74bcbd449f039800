"""The record, version 2: a header that says what follows, then a chunk's ranges. `docs/reference/record.md`.

Bytes only: this module knows no files, no network and no list of records. `Records` is the only code that turns a chunk
into the bytes that a place keeps, and back.

All numbers are little-endian. The header is n x 4 KiB; its last 16 bytes are the xxh3-128 of all its bytes before them,
so that a header with one flipped bit is no header. The ranges follow, each padded with zeros to 4 KiB.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from kvkeep.core.layout import padded_nbytes
from kvkeep.core.units import ALIGN_NBYTES, KEY_NBYTES, NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.errors import CorruptChunk, TierError
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.codec import NO_SEAL, RAW, Codec, Seal
from kvkeep.tiers.tier import Bytes, Read, Write

VERSION = 2

_MAGIC = b"kvkeep\r\n"  # a transfer that converts line ends breaks it
_START = struct.Struct("<8sHHI")
_FIXED = struct.Struct("<8sHHIIIQ16s32s16s24sQ")
_RANGE_FIELDS = "QQ16s16s"
_RANGE = struct.Struct(f"<{_RANGE_FIELDS}")
_MAX_PAGES = 1024  # room for 87,000 ranges; bounds what a reader allocates for bytes that are no header
_MAX_RANGE_NBYTES = 1 << 48


class Header(NamedTuple):
    """What a record says of itself.

    `raw_sizes` and `raw_sums` are those of the ranges as the engine had them (padded bytes, xxh3-128), `sizes` those
    of the encoded ranges, and `sums` those of the encoded ranges with their padding. Sums are in one piece. `tokens`:
    how many tokens the chunk has, 0 for as many as its namespace says.
    """

    key: bytes
    epoch: int
    raw_sizes: tuple[int, ...]
    raw_sums: bytes
    sizes: tuple[int, ...]
    sums: bytes
    codec: int = RAW
    tokens: int = 0
    seal: Seal = NO_SEAL

    @property
    def nbytes(self) -> int:
        """The whole record's bytes."""
        return record_nbytes(self.sizes)


def raw_header(key: bytes, epoch: int, sizes: Sequence[int], sums: bytes, tokens: int = 0) -> Header:
    """The header of a record that keeps its ranges as they are."""
    kept = tuple(sizes)
    return Header(key, epoch, kept, sums, sizes=kept, sums=sums, tokens=tokens)


def record_name(key: bytes) -> str:
    """The name that a record has in every place: `<namespace>/<first byte of the digest>/<digest>`, in hex."""
    digest = key[NAMESPACE_NBYTES:].hex()
    return f"{key[:NAMESPACE_NBYTES].hex()}/{digest[:2]}/{digest}"


def key_in_name(name: str) -> bytes | None:
    """The key whose record has this name; None for any other name."""
    parts = name.split("/")
    try:
        key = bytes.fromhex(parts[0] + parts[-1])
    except ValueError:
        return None
    return key if len(key) == KEY_NBYTES and record_name(key) == name else None


def header_nbytes(ranges: int) -> int:
    """How many bytes the header of a record of so many ranges takes."""
    return padded_nbytes(_FIXED.size + ranges * _RANGE.size + SUM_NBYTES)


def record_nbytes(sizes: Sequence[int]) -> int:
    """How many bytes a record takes whose encoded ranges have these sizes."""
    return header_nbytes(len(sizes)) + sum([-(-size // ALIGN_NBYTES) for size in sizes]) * ALIGN_NBYTES


def fits(sizes: Sequence[int], sums: bytes) -> bool:
    """Whether a record can hold ranges of such sizes, each with its sum."""
    bits = 0
    for size in sizes:
        bits |= size
    whole = not bits % ALIGN_NBYTES and (not sizes or (min(sizes) > 0 and bits < _MAX_RANGE_NBYTES))
    return whole and header_nbytes(len(sizes)) <= _MAX_PAGES * ALIGN_NBYTES and len(sums) == len(sizes) * SUM_NBYTES


def encode_header(header: Header, out: Bytes) -> None:
    """Write the header into `out`, uint8 [header_nbytes(number of ranges)]; TierError for what no record can say."""
    count = len(header.sizes)
    if len(header.key) != KEY_NBYTES or out.nbytes != header_nbytes(count) or not _is_sound(header):
        said = f"{count} ranges with {len(header.sums)} bytes of sums, for a key of {len(header.key)} bytes"
        raise TierError(f"no record has {said}, in a header of {out.nbytes} bytes; ranges are padded to 4 KiB")
    namespace, digest = header.key[:NAMESPACE_NBYTES], header.key[NAMESPACE_NBYTES:]
    fixed = (_MAGIC, VERSION, out.nbytes // ALIGN_NBYTES, count, header.codec, header.tokens, header.epoch)
    out[:] = 0
    _FIXED.pack_into(out.data, 0, *fixed, namespace, digest, *header.seal, 0)
    sums, raw_sums = _split(header.sums), _split(header.raw_sums)
    rows = chain.from_iterable(zip(header.sizes, header.raw_sizes, sums, raw_sums, strict=True))
    struct.pack_into("<" + count * _RANGE_FIELDS, out.data, _FIXED.size, *rows)
    out[-SUM_NBYTES:] = np.frombuffer(_sum(out[:-SUM_NBYTES]), np.uint8)


def stated_version(start: Bytes) -> int | None:
    """The version of the record whose first bytes `start` are, unverified; None where they begin no record."""
    if start.nbytes < _START.size:
        return None
    magic, version, _, _ = _START.unpack_from(start.data)
    return int(version) if magic == _MAGIC else None


def stated_header_nbytes(start: Bytes) -> int:
    """How long the header is whose first bytes `start` are, unverified; CorruptChunk if they cannot begin one."""
    if start.nbytes < _FIXED.size:
        raise CorruptChunk(f"torn: {start.nbytes} bytes hold no header")
    _, version, pages, count = _START.unpack_from(start.data)
    if stated_version(start) is None:
        raise CorruptChunk("no record: it begins with other bytes")
    if version != VERSION:
        raise CorruptChunk(f"version {version} of the record is not {VERSION}")
    if not 0 < pages <= _MAX_PAGES or header_nbytes(count) != pages * ALIGN_NBYTES:
        raise CorruptChunk(f"a header of {pages} pages does not hold {count} ranges")
    return int(pages) * ALIGN_NBYTES


def decode_header(octets: Bytes) -> Header:
    """Read a header from the beginning of `octets`, uint8; what follows it is not looked at.

    Raises CorruptChunk, saying what is wrong, for all bytes that `encode_header` does not write.
    """
    nbytes = stated_header_nbytes(octets)
    if octets.nbytes < nbytes:
        raise CorruptChunk(f"torn: {octets.nbytes} of the header's {nbytes} bytes")
    data = octets[:nbytes].tobytes()
    if xxhash.xxh3_128_digest(data[:-SUM_NBYTES]) != data[-SUM_NBYTES:]:
        raise CorruptChunk("the header's checksum does not hold")
    _, _, _, count, codec, tokens, epoch, namespace, digest, key_id, nonce, reserved = _FIXED.unpack_from(data)
    end = _FIXED.size + count * _RANGE.size
    columns = zip(*_RANGE.iter_unpack(data[_FIXED.size : end]), strict=True)
    sizes, raw_sizes, sums, raw_sums = columns if count else ((), (), (), ())
    header = Header(
        namespace + digest,
        epoch,
        raw_sizes,
        b"".join(raw_sums),
        sizes=sizes,
        sums=b"".join(sums),
        codec=codec,
        tokens=tokens,
        seal=Seal(key_id, nonce),
    )
    if not _is_sound(header):
        raise CorruptChunk("the sizes or sums of its ranges cannot be right")
    if reserved or data[end:-SUM_NBYTES] != bytes(nbytes - SUM_NBYTES - end):
        raise CorruptChunk(f"bytes that version {VERSION} does not use are not zero")
    return header


def first_bad_range(payload: Bytes, sizes: Sequence[int], sums: bytes) -> int | None:
    """The index of the first range of `payload` whose sum does not hold; None: all bytes are right.

    The ranges follow each other, each padded to 4 KiB; the sums are of the padded ranges.
    """
    start = 0
    for index, size in enumerate(sizes):
        end = start + size + -size % ALIGN_NBYTES
        if _sum(payload[start:end]) != sums[index * SUM_NBYTES : (index + 1) * SUM_NBYTES]:
            return index
        start = end
    return None


def _is_sound(header: Header) -> bool:
    """Whether a record can be so: raw ranges of whole pages, encoded ones of any size, a sum for each."""
    if not fits(header.raw_sizes, header.raw_sums):
        return False
    if header.codec == RAW:
        return (header.sizes, header.sums, header.seal) == (header.raw_sizes, header.raw_sums, NO_SEAL)
    as_many = len(header.sizes) == len(header.raw_sizes) and len(header.sums) == len(header.raw_sums)
    return as_many and all(0 < size < _MAX_RANGE_NBYTES for size in header.sizes)


def _split(sums: bytes) -> list[bytes]:
    return [sums[start : start + SUM_NBYTES] for start in range(0, len(sums), SUM_NBYTES)]


def _sum(octets: Bytes) -> bytes:
    return xxhash.xxh3_128_digest(octets.data)


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
