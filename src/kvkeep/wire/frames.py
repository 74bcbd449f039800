"""Makes frames of messages and finds frames in a stream of bytes.

A frame is a 4-byte big-endian length, then that many bytes. A length over the bound is refused before any of these
bytes is kept. Pure: knows nothing about sockets or about what a frame means.
"""

from __future__ import annotations

from kvkeep.errors import WireError

HEADER_NBYTES = 4
MAX_FRAME_NBYTES = 4 << 20
READ_NBYTES = 1 << 16  # at a time: a larger buffer is a fresh mapping for every read, which costs more than it saves


def framed(payload: bytes) -> bytes:
    """`payload` with its length in front; WireError if it is over the bound."""
    if len(payload) > MAX_FRAME_NBYTES:
        raise WireError(f"a frame of {len(payload)} bytes is over the bound of {MAX_FRAME_NBYTES}")
    return len(payload).to_bytes(HEADER_NBYTES, "big") + payload


class FrameReader:
    """Collects bytes of one stream and returns whole frames, in order."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes; WireError as soon as a frame begins with a length over the bound."""
        self._buffer += data
        frames: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= HEADER_NBYTES:
            nbytes = int.from_bytes(self._buffer[start : start + HEADER_NBYTES], "big")
            if nbytes > MAX_FRAME_NBYTES:
                raise WireError(f"a frame of {nbytes} bytes is over the bound of {MAX_FRAME_NBYTES}")
            end = start + HEADER_NBYTES + nbytes
            if end > len(self._buffer):
                break
            frames.append(bytes(self._buffer[start + HEADER_NBYTES : end]))
            start = end
        del self._buffer[:start]
        return frames
