"""The slot for a codec: what turns the bytes of a range into what a record keeps of them, and back.

Without a codec ranges are kept as they are (RAW), which is all that kvkeep does now. A codec works on one range at a
time, and knows no files and no headers: the record names the codec, and keeps for it the key and the nonce.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvkeep.tiers.tier import Bytes

RAW = 0  # the codec id of ranges that are kept as they are
KEY_ID_NBYTES, NONCE_NBYTES = 16, 24


class Seal(NamedTuple):
    """What a record keeps for a codec that encrypts: which key, and the nonce of its first range (each next: + 1).

    All zeros where nothing is encrypted.
    """

    key_id: bytes = bytes(KEY_ID_NBYTES)
    nonce_base: bytes = bytes(NONCE_NBYTES)


NO_SEAL = Seal()


class Codec(Protocol):
    """Encodes ranges; any thread may call it at any time. `decode` gives back exactly what `encode` took.

    `codec_id` stands in every record, and never means anything else.
    """

    @property
    def codec_id(self) -> int:
        """A number above RAW that no other codec has."""

    def most_nbytes(self, nbytes: int) -> int:
        """The most bytes that a range of `nbytes` can take once it is encoded."""

    def seal(self) -> Seal:
        """A seal for one new record: a nonce that no record had before, or NO_SEAL."""

    def encode(self, range_: Bytes, index: int, seal: Seal) -> bytes:
        """Encode range `index` of a record."""

    def decode(self, stored: Bytes, index: int, seal: Seal, into: Bytes) -> None:
        """Fill `into` with range `index` of a record; CorruptChunk where `stored` is not what `encode` gave."""
