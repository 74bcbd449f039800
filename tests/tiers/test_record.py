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
from kvkeep.tiers.codec import Seal
from kvkeep.tiers.record import (
    Header,
    decode_header,
    encode_header,
    first_bad_range,
    header_nbytes,
    key_in_name,
    raw_header,
    record_name,
    record_nbytes,
    stated_header_nbytes,
    stated_version,
)
from kvkeep.tiers.tier import Bytes

RANGES = st.integers(1, 2**35).map(lambda n: n * 4096)


def raw_headers(count: int) -> st.SearchStrategy[Header]:
    return st.builds(
        raw_header,
        st.binary(min_size=48, max_size=48),
        st.integers(0, 2**64 - 1),
        st.lists(RANGES, min_size=count, max_size=count).map(tuple),
        st.binary(min_size=16 * count, max_size=16 * count),
        st.integers(0, 2**32 - 1),
    )


def encoded_headers(count: int) -> st.SearchStrategy[Header]:
    return st.builds(
        Header,
        st.binary(min_size=48, max_size=48),
        st.integers(0, 2**64 - 1),
        st.lists(RANGES, min_size=count, max_size=count).map(tuple),
        st.binary(min_size=16 * count, max_size=16 * count),
        st.lists(st.integers(1, 2**48 - 1), min_size=count, max_size=count).map(tuple),
        st.binary(min_size=16 * count, max_size=16 * count),
        st.integers(1, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.builds(Seal, st.binary(min_size=16, max_size=16), st.binary(min_size=24, max_size=24)),
    )


HEADERS = st.integers(0, 200).flatmap(raw_headers) | st.integers(0, 200).flatmap(encoded_headers)
SMALL = raw_header(key(1), 7, (4096, 8192), bytes(range(32)), 256)


def encoded(header: Header) -> Bytes:
    out = np.full(header_nbytes(len(header.sizes)), 0xEE, np.uint8)
    encode_header(header, out)
    return out


def sealed(octets: Bytes) -> Bytes:
    """The same with a right checksum."""
    octets[-16:] = np.frombuffer(xxhash.xxh3_128_digest(octets[:-16].data), np.uint8)
    return octets


@given(HEADERS)
@example(raw_header(bytes(48), 0, (), b""))
def test_a_header_comes_back(header: Header) -> None:
    octets = encoded(header)
    assert octets.nbytes == stated_header_nbytes(octets)
    assert octets.nbytes % 4096 == 0
    assert decode_header(octets) == header
    assert decode_header(np.concatenate([octets, np.ones(99, np.uint8)])) == header
    assert stated_version(octets) == 2
    assert header.nbytes == octets.nbytes + sum(-(-size // 4096) * 4096 for size in header.sizes)
    assert header.nbytes == record_nbytes(header.sizes)


def test_the_bytes_are_those_of_the_reference() -> None:
    """This is docs/reference/record.md, field by field."""
    octets = encoded(SMALL).tobytes()
    assert octets[:8] == b"kvkeep\r\n"
    assert struct.unpack_from("<HHIII", octets, 8) == (2, 1, 2, 0, 256)
    assert struct.unpack_from("<Q", octets, 24) == (7,)
    assert octets[32:80] == key(1)
    assert octets[80:128] == bytes(48)
    assert octets[128:176] == struct.pack("<QQ", 4096, 4096) + bytes(range(16)) * 2
    assert octets[176:224] == struct.pack("<QQ", 8192, 8192) + bytes(range(16, 32)) * 2
    assert octets[224:4080] == bytes(4080 - 224)
    assert octets[4080:] == xxhash.xxh3_128_digest(octets[:4080])


def test_the_fields_of_a_codec_are_where_the_reference_says() -> None:
    seal = Seal(b"k" * 16, b"n" * 24)
    octets = encoded(Header(key(1), 7, (8192,), b"r" * 16, (4097,), b"s" * 16, 9, 0, seal)).tobytes()
    assert struct.unpack_from("<II", octets, 16) == (9, 0)
    assert octets[80:128] == b"k" * 16 + b"n" * 24 + bytes(8)
    assert octets[128:176] == struct.pack("<QQ", 4097, 8192) + b"s" * 16 + b"r" * 16


def test_the_header_grows_by_whole_pages() -> None:
    assert [header_nbytes(count) for count in (0, 1, 82, 83, 167, 168)] == [4096, 4096, 4096, 8192, 8192, 12288]


def test_a_record_has_one_name_and_a_name_one_key() -> None:
    name = record_name(key(1))
    assert name == f"{'01' * 16}/{key(1)[16:17].hex()}/{key(1)[16:].hex()}"
    assert key_in_name(name) == key(1)
    for other in (
        "",
        "epochs",
        name[:-1],
        name.upper(),
        name.replace("/", "//", 1),
        name + "/",
        f"/{name}",
        "x" + name,
    ):
        assert key_in_name(other) is None, other


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
        (8, struct.pack("<H", 1)),
        (8, struct.pack("<H", 3)),
        (10, struct.pack("<H", 0)),
        (10, struct.pack("<H", 2)),
        (10, struct.pack("<H", 65535)),
        (12, struct.pack("<I", 83)),
        (12, struct.pack("<I", 2**32 - 1)),
        (12, struct.pack("<I", 3)),
        (12, struct.pack("<I", 1)),
        (80, b"k"),
        (96, b"n"),
        (120, b"\1"),
        (128, struct.pack("<QQ", 0, 0)),
        (128, struct.pack("<QQ", 4097, 4097)),
        (128, struct.pack("<QQ", 2**64 - 4096, 2**64 - 4096)),
        (128, struct.pack("<QQ", 1 << 48, 1 << 48)),
        (128, struct.pack("<QQ", 8192, 4096)),
        (128, struct.pack("<QQ", 4096, 8192)),
        (144, b"x"),
        (160, b"x"),
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
    assert (encoded(found) == octets[: header_nbytes(len(found.sizes))]).all()


def test_sums_name_the_bad_range() -> None:
    write = write_of(key(1))
    assert first_bad_range(write.payload, write.sizes, write.sums) is None
    for place, bad in ((0, 0), (4095, 0), (4096, 1), (16383, 1), (16384, 2), (24575, 2)):
        write.payload[place] ^= 1
        assert first_bad_range(write.payload, write.sizes, write.sums) == bad
        write.payload[place] ^= 1
