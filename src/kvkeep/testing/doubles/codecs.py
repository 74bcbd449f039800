"""Codecs for tests: what the slot of a record can do, without being of use to anybody."""

from __future__ import annotations

import secrets
import zlib

import numpy as np

from kvkeep.errors import CorruptChunk
from kvkeep.tiers.codec import KEY_ID_NBYTES, NONCE_NBYTES, Seal
from kvkeep.tiers.tier import Bytes

_NONCES = 1 << (8 * NONCE_NBYTES)


class ZlibCodec:
    """Compresses, and binds each range to its record's nonce and its index, as a codec that encrypts would."""

    codec_id = 77

    def most_nbytes(self, nbytes: int) -> int:
        """As `Codec.most_nbytes`."""
        return nbytes + nbytes // 1000 + 64 + NONCE_NBYTES

    def seal(self) -> Seal:
        """As `Codec.seal`."""
        return Seal(b"test".ljust(KEY_ID_NBYTES, b"\0"), secrets.token_bytes(NONCE_NBYTES))

    def encode(self, range_: Bytes, index: int, seal: Seal) -> bytes:
        """As `Codec.encode`."""
        return _nonce(seal, index) + zlib.compress(range_.tobytes(), 1)

    def decode(self, stored: Bytes, index: int, seal: Seal, into: Bytes) -> None:
        """As `Codec.decode`."""
        octets = stored.tobytes()
        try:
            raw = zlib.decompress(octets[NONCE_NBYTES:])
        except zlib.error as error:
            raise CorruptChunk(f"the range cannot be decoded: {error}") from error
        if octets[:NONCE_NBYTES] != _nonce(seal, index) or len(raw) != into.nbytes:
            raise CorruptChunk("the range is another one")
        into[:] = np.frombuffer(raw, np.uint8)


def _nonce(seal: Seal, index: int) -> bytes:
    number = (int.from_bytes(seal.nonce_base, "little") + index) % _NONCES
    return number.to_bytes(NONCE_NBYTES, "little")
