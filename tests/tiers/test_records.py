"""Records with a codec: what is made is verified and decoded, and no other bytes are."""

from __future__ import annotations

import numpy as np
import pytest

from kvkeep.core.layout import padded_nbytes
from kvkeep.errors import CorruptChunk
from kvkeep.testing.doubles.codecs import ZlibCodec
from kvkeep.testing.suites.tiers import SIZES, key, memory_for, write_of
from kvkeep.tiers.codec import Seal
from kvkeep.tiers.record import RAW_RECORDS, Records, decode_header, encode_header, header_nbytes
from kvkeep.tiers.tier import Bytes, Write

WRITE = write_of(key(1))
CODED = Records(ZlibCodec())


def made(records: Records, write: Write = WRITE, epoch: int = 7) -> tuple[Bytes, Bytes]:
    octets = np.full(header_nbytes(len(write.sizes)), 0xEE, np.uint8)
    return octets, records.make(write, epoch, octets)


def found(records: Records, octets: Bytes, payload: Bytes, epoch: int = 7, write: Write = WRITE) -> bool:
    """Whether the record is right; then it is what was written."""
    read, _ = memory_for(write.key, write.sizes)
    memory = records.payload_memory(read, payload.nbytes)
    if memory is None:
        return False
    memory[:] = payload
    sums = records.verify(octets, memory, read, epoch)
    assert sums is None or (sums, bytes(read.into)) == (write.sums, bytes(write.payload))
    return sums is not None


@pytest.mark.parametrize("records", [RAW_RECORDS, CODED], ids=["raw", "codec"])
def test_what_is_made_is_read_and_nothing_else(records: Records) -> None:
    octets, payload = made(records)
    assert found(records, octets, payload)
    assert not found(records, octets, payload, epoch=8)
    assert not found(records, octets, payload, write=write_of(key(2)))
    assert not found(records, octets, payload, write=write_of(key(1), tuple(reversed(SIZES))))
    assert not found(records, octets, payload[:-4096])
    for place in range(0, payload.nbytes, 1021):
        payload[place] ^= 1
        assert not found(records, octets, payload), place
        payload[place] ^= 1
    assert octets.nbytes + payload.nbytes <= records.most_nbytes(SIZES)


def test_a_record_of_another_codec_is_none_of_ours() -> None:
    octets, payload = made(CODED)
    assert not found(RAW_RECORDS, octets, payload)
    octets, payload = made(RAW_RECORDS)
    assert not found(CODED, octets, payload)


def test_a_codec_that_decodes_to_other_bytes_is_found_out() -> None:
    """The raw sums are compared after it, whatever it says."""

    class Wrong(ZlibCodec):
        def decode(self, stored: Bytes, index: int, seal: Seal, into: Bytes) -> None:
            super().decode(stored, index, seal, into)
            into[-1] ^= index == 2

    octets, payload = made(CODED)
    assert not found(Records(Wrong()), octets, payload)


def test_a_codec_sees_no_byte_that_its_sum_does_not_vouch_for() -> None:
    class Strict(ZlibCodec):
        def decode(self, stored: Bytes, index: int, seal: Seal, into: Bytes) -> None:
            raise AssertionError("a decoder was given bytes that were not compared")

    octets, payload = made(CODED)
    payload[100] ^= 1
    assert not found(Records(Strict()), octets, payload)


def test_ranges_cannot_change_places() -> None:
    """Two ranges of one size, each good by its sum, sums and all exchanged under a right header: the codec refuses."""
    write = write_of(key(1), (8192, 8192))
    octets, payload = made(CODED, write)
    header = decode_header(octets)
    (first, second), half = header.sizes, padded_nbytes(header.sizes[0])
    assert padded_nbytes(second) == half
    sums, raw = header.sums, header.raw_sums
    swapped = header._replace(sizes=(second, first), sums=sums[16:] + sums[:16], raw_sums=raw[16:] + raw[:16])
    encode_header(swapped, octets)
    read, _ = memory_for(write.key, write.sizes)
    assert CODED.verify(octets, np.concatenate([payload[half:], payload[:half]]), read, 7) is None
    with pytest.raises(CorruptChunk):
        CODED.codec.decode(payload[half : half + second], 0, header.seal, read.into[:8192])  # type: ignore[union-attr]


def test_the_tokens_of_a_chunk_are_kept() -> None:
    for records in (RAW_RECORDS, CODED):
        octets, _ = made(records, WRITE._replace(tokens=100))
        assert decode_header(octets).tokens == 100
