"""The record format: every header comes back as it was, and no other bytes are a header."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvkeep.errors import CorruptChunk
from kvkeep.testing.suites.tiers import key, write_of
from kvkeep.tiers.record import (
    Header,
    announced_header_nbytes,
    decode_header,
    encode_header,
    first_bad_range,
    header_nbytes,
    record_nbytes,
)
from kvkeep.tiers.tier import Bytes

HEADERS = st.integers(0, 400).flatmap(
    lambda count: st.builds(
        Header,
        st.binary(min_size=48, max_size=48),
        st.integers(0, 2**64 - 1),
        st.lists(st.integers(1, 2**35).map(lambda n: n * 4096), min_size=count, max_size=count).map(tuple),
        st.binary(min_size=16 * count, max_size=16 * count),
        st.integers(0, 2**32 - 1),
    )
)
SMALL = Header(key(1), 7, (4096, 8192), bytes(range(32)))


def encoded(header: Header) -> Bytes:
    out = np.full(header_nbytes(len(header.sizes)), 0xEE, np.uint8)
    encode_header(header, out)
    return out


def sealed(octets: Bytes) -> Bytes:
    """The same with a right checksum."""
    octets[-16:] = np.frombuffer(xxhash.xxh3_128_digest(octets[:-16].data), np.uint8)
    return octets


@given(HEADERS)
@example(Header(bytes(48), 0, (), b""))
def test_a_header_comes_back(header: Header) -> None:
    octets = encoded(header)
    assert octets.nbytes == announced_header_nbytes(octets)
    assert octets.nbytes % 4096 == 0
    assert decode_header(octets) == header
    assert decode_header(np.concatenate([octets, np.ones(99, np.uint8)])) == header
    assert header.nbytes == octets.nbytes + sum(header.sizes) == record_nbytes(header.sizes)


def test_the_bytes_are_those_of_the_reference() -> None:
    """Version 1 is read for ever: this is docs/reference/record.md, field by field."""
    octets = encoded(SMALL).tobytes()
    assert octets[:8] == b"kvkeep\r\n"
    assert struct.unpack_from("<HHIII", octets, 8) == (1, 1, 2, 0, 0)
    assert struct.unpack_from("<Q", octets, 24) == (7,)
    assert octets[32:80] == key(1)
    assert octets[80:104] == struct.pack("<Q", 4096) + bytes(range(16))
    assert octets[104:128] == struct.pack("<Q", 8192) + bytes(range(16, 32))
    assert octets[128:4080] == bytes(4080 - 128)
    assert octets[4080:] == xxhash.xxh3_128_digest(octets[:4080])


def test_the_header_grows_by_whole_pages() -> None:
    assert [header_nbytes(count) for count in (0, 1, 166, 167, 337, 338)] == [4096, 4096, 4096, 8192, 8192, 12288]


def test_every_flipped_bit_is_seen() -> None:
    octets = encoded(SMALL)
    for place in range(octets.nbytes):
        for bit in range(8):
            octets[place] ^= 1 << bit
            with pytest.raises(CorruptChunk):
                decode_header(octets)
            octets[place] ^= 1 << bit
    assert decode_header(octets) == SMALL


def test_every_truncation_is_seen() -> None:
    octets = encoded(SMALL)
    for nbytes in range(octets.nbytes):
        with pytest.raises(CorruptChunk):
            decode_header(octets[:nbytes])


@given(st.binary(max_size=5000), st.booleans())
@example(b"", False)
@example(b"kvkeep\r\n", True)
def test_any_bytes_are_a_typed_error(octets: bytes, begins_well: bool) -> None:
    start = encoded(SMALL).tobytes()[:80] if begins_well else b""
    with pytest.raises(CorruptChunk):
        decode_header(np.frombuffer(start + octets, np.uint8))


@pytest.mark.parametrize(
    ("at", "field"),
    [
        (0, b"kvkeep\n\0"),
        (8, struct.pack("<H", 0)),
        (8, struct.pack("<H", 2)),
        (10, struct.pack("<H", 0)),
        (10, struct.pack("<H", 2)),
        (10, struct.pack("<H", 65535)),
        (12, struct.pack("<I", 167)),
        (12, struct.pack("<I", 2**32 - 1)),
        (12, struct.pack("<I", 3)),
        (12, struct.pack("<I", 1)),
        (20, struct.pack("<I", 1)),
        (80, struct.pack("<Q", 0)),
        (80, struct.pack("<Q", 4097)),
        (80, struct.pack("<Q", 2**64 - 4096)),
        (80, struct.pack("<Q", 1 << 48)),
        (4079, b"\1"),
    ],
)
def test_a_wrong_field_is_seen_also_under_a_right_checksum(at: int, field: bytes) -> None:
    octets = encoded(SMALL)
    octets[at : at + len(field)] = np.frombuffer(field, np.uint8)
    with pytest.raises(CorruptChunk):
        decode_header(sealed(octets))


@given(HEADERS, st.data())
def test_what_is_sealed_and_read_encodes_to_the_same_bytes(header: Header, data: st.DataObject) -> None:
    """Nothing in a header is ignored: one that decodes has only one form."""
    octets = encoded(header)
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, octets.nbytes - 17))] = data.draw(st.integers(0, 255))
    sealed(octets)
    try:
        found = decode_header(octets)
    except CorruptChunk:
        return
    assert (encoded(found) == octets[: found.nbytes - sum(found.sizes)]).all()


def test_sums_name_the_bad_range() -> None:
    write = write_of(key(1))
    assert first_bad_range(write.payload, write.sizes, write.sums) is None
    for place, bad in ((0, 0), (4095, 0), (4096, 1), (16383, 1), (16384, 2), (24575, 2)):
        write.payload[place] ^= 1
        assert first_bad_range(write.payload, write.sizes, write.sums) == bad
        write.payload[place] ^= 1
