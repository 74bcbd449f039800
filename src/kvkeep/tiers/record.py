"""The disk record, version 1: a header that says what follows, then a chunk's ranges. `docs/reference/record.md`.

Bytes only. Knows nothing about files, directories, or which records there are.

All numbers are little-endian. The header is n x 4 KiB; its last 16 bytes are the xxh3-128 of all its bytes before them,
so that one flipped bit anywhere in it makes it no header. The ranges follow without gaps, each padded to 4 KiB.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from kvkeep.core.layout import padded_nbytes
from kvkeep.core.units import ALIGN_NBYTES, KEY_NBYTES, NAMESPACE_NBYTES, SUM_NBYTES
from kvkeep.errors import CorruptChunk, TierError
from kvkeep.tiers.tier import Bytes

VERSION = 1
RAW = 0  # the codec id of ranges that are kept as they are

_MAGIC = b"kvkeep\r\n"  # a transfer that converts line ends breaks it
_FIXED = struct.Struct("<8sHHIIIQ16s32s")
_RANGE = struct.Struct("<Q16s")
_MAX_PAGES = 1024  # room for 174,000 ranges; bounds what a reader allocates for bytes that are no header
_MAX_RANGE_NBYTES = 1 << 48


class Header(NamedTuple):
    """What a record says of itself: padded `sizes` of its ranges, their `sums` (16 bytes each, in one piece)."""

    key: bytes
    epoch: int
    sizes: tuple[int, ...]
    sums: bytes
    codec: int = RAW

    @property
    def nbytes(self) -> int:
        """The whole record's bytes."""
        return record_nbytes(self.sizes)


def header_nbytes(ranges: int) -> int:
    """How many bytes the header of a record of so many ranges takes."""
    return padded_nbytes(_FIXED.size + ranges * _RANGE.size + SUM_NBYTES)


def record_nbytes(sizes: Sequence[int]) -> int:
    """How many bytes a record with ranges of `sizes` takes."""
    return header_nbytes(len(sizes)) + sum(sizes)


def fits(sizes: Sequence[int], sums: bytes) -> bool:
    """Whether a record can hold ranges of such sizes, each with its sum."""
    whole = all(0 < size < _MAX_RANGE_NBYTES and not size % ALIGN_NBYTES for size in sizes)
    return whole and header_nbytes(len(sizes)) <= _MAX_PAGES * ALIGN_NBYTES and len(sums) == len(sizes) * SUM_NBYTES


def encode_header(header: Header, out: Bytes) -> None:
    """Write the header into `out`, uint8 [header_nbytes(number of ranges)]; TierError for what no record can say."""
    count = len(header.sizes)
    pages = out.nbytes // ALIGN_NBYTES
    if len(header.key) != KEY_NBYTES or out.nbytes != header_nbytes(count) or not fits(header.sizes, header.sums):
        said = f"{count} ranges with {len(header.sums)} bytes of sums, for a key of {len(header.key)} bytes"
        raise TierError(f"no record has {said}, in a header of {out.nbytes} bytes; ranges are padded to 4 KiB")
    namespace, digest = header.key[:NAMESPACE_NBYTES], header.key[NAMESPACE_NBYTES:]
    fixed = (_MAGIC, VERSION, pages, count, header.codec, 0, header.epoch, namespace, digest)
    out[:] = 0
    _FIXED.pack_into(out.data, 0, *fixed)
    for number, size in enumerate(header.sizes):
        one = header.sums[number * SUM_NBYTES : (number + 1) * SUM_NBYTES]
        _RANGE.pack_into(out.data, _FIXED.size + number * _RANGE.size, size, one)
    out[-SUM_NBYTES:] = np.frombuffer(_sum(out[:-SUM_NBYTES]), np.uint8)


def announced_header_nbytes(start: Bytes) -> int:
    """How long the header is whose first bytes `start` are, unverified; CorruptChunk if they cannot begin one."""
    if start.nbytes < _FIXED.size:
        raise CorruptChunk(f"torn: {start.nbytes} bytes hold no header")
    magic, version, pages, count, *_ = _FIXED.unpack_from(start.data)
    if magic != _MAGIC:
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
    nbytes = announced_header_nbytes(octets)
    if octets.nbytes < nbytes:
        raise CorruptChunk(f"torn: {octets.nbytes} of the header's {nbytes} bytes")
    data = octets[:nbytes].tobytes()
    if xxhash.xxh3_128_digest(data[:-SUM_NBYTES]) != data[-SUM_NBYTES:]:
        raise CorruptChunk("the header's checksum does not hold")
    _, _, _, count, codec, reserved, epoch, namespace, digest = _FIXED.unpack_from(data)
    end = _FIXED.size + count * _RANGE.size
    table = list(_RANGE.iter_unpack(data[_FIXED.size : end]))
    sizes = tuple([size for size, _ in table])
    if any(not 0 < size < _MAX_RANGE_NBYTES or size % ALIGN_NBYTES for size in sizes):
        raise CorruptChunk("a range's size is no multiple of 4 KiB")
    if reserved or data[end:-SUM_NBYTES] != bytes(nbytes - SUM_NBYTES - end):
        raise CorruptChunk("bytes that version 1 does not use are not zero")
    return Header(namespace + digest, epoch, sizes, b"".join([one for _, one in table]), codec)


def first_bad_range(payload: Bytes, sizes: Sequence[int], sums: bytes) -> int | None:
    """The number of the first range of `payload` whose sum does not hold; None: all bytes are right."""
    start = 0
    for number, size in enumerate(sizes):
        if _sum(payload[start : start + size]) != sums[number * SUM_NBYTES : (number + 1) * SUM_NBYTES]:
            return number
        start += size
    return None


def _sum(octets: Bytes) -> bytes:
    return xxhash.xxh3_128_digest(octets.data)
