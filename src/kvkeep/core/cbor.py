"""Canonical CBOR (RFC 8949), as much of it as digests and namespaces need; it only encodes.

Byte for byte what `cbor2.dumps(value, canonical=True)` gives for the same value. Knows nothing about tokens,
chunks or identities: the callers give the values their meaning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP = (major << 5 for major in range(6))
_ONE_BYTE = 0x18  # the head of an unsigned int with one byte to follow; with two, four and eight those after it

_WORD_NBYTES = 8
_HEADS = np.array([0, 0, _ONE_BYTE, _ONE_BYTE + 1, 0, _ONE_BYTE + 2], "<u8")  # by the width of an encoding
_SHIFTS = np.array([0, 56, 48, 40, 0, 24], "<u8")  # what brings the low byte of a big-endian word to its encoding's end

Words = npt.NDArray[np.uint32]
Octets = npt.NDArray[np.uint8]


def encode(value: Any) -> bytes:
    """Encode None, bools, ints of 64 bits, bytes, text, tuples, lists and dicts with text keys.

    Raises TypeError for any other type, floats included (their canonical form is a choice nobody here needs),
    ValueError for an int beyond 64 bits and for text that is not valid Unicode.
    """
    if value is None:
        return b"\xf6"
    if isinstance(value, bool):
        return b"\xf5" if value else b"\xf4"
    if isinstance(value, int):
        return head(_UINT, value) if value >= 0 else head(_NEGATIVE, -1 - value)
    if isinstance(value, bytes):
        return head(_BYTES, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return head(_TEXT, len(text)) + text
    if isinstance(value, (tuple, list)):
        return array_head(len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        return _map(value)
    raise TypeError(f"canonical CBOR of a {type(value).__name__} is not defined here")


def head(major: int, argument: int) -> bytes:
    """Encode an item's first bytes: its major type (shifted already) and its argument in shortest form."""
    if argument < 24:
        return bytes((major | argument,))
    for code, width in enumerate((1, 2, 4, 8), start=_ONE_BYTE):
        if argument < 1 << 8 * width:
            return bytes((major | code,)) + argument.to_bytes(width, "big")
    raise ValueError(f"an int or a length of {argument.bit_length()} bits does not fit into CBOR's 64")


def array_head(count: int) -> bytes:
    """Encode what goes before the `count` items of an array."""
    return head(_ARRAY, count)


def _map(value: dict[Any, Any]) -> bytes:
    """Encode a map with text keys, whose length-first and bytewise canonical orders are the same."""
    if not all(isinstance(key, str) for key in value):
        raise TypeError("canonical CBOR of a map is defined here for text keys only")
    items = sorted((encode(key), encode(item)) for key, item in value.items())
    return head(_MAP, len(items)) + b"".join(key + item for key, item in items)


def encode_uints(values: Words, run: int) -> tuple[Octets, list[int]]:
    """Encode runs of `run` unsigned ints each, without array heads, all at once.

    `values` is uint32 [n * run], n > 0. Returns the bytes and n + 1 offsets, run i from offsets[i] to
    offsets[i + 1].

    Each int becomes one word of eight bytes that begins with its encoding. The words are written in their order to
    where their encodings belong, each over the unused end of the one before: four times as fast as squeezing the
    unused bytes out.
    """
    widths = (values > 0xFFFF).view(np.uint8)
    widths += widths
    widths += (values > 0xFF).view(np.uint8)
    widths += (values > 23).view(np.uint8)
    widths += np.uint8(1)  # 1, 2, 3 or 5 bytes
    words = values.astype(">u8").view("<u8")  # the last byte is the highest now
    words >>= np.take(_SHIFTS, widths, mode="clip")
    words |= np.take(_HEADS, widths, mode="clip")
    ends = np.cumsum(widths, dtype=np.int64)
    octets = np.empty(int(ends[-1]) + _WORD_NBYTES, np.uint8)
    np.ndarray(octets.size - _WORD_NBYTES, "<u8", octets, strides=(1,))[ends - widths] = words
    return octets, [0, *ends[run - 1 :: run].tolist()]


def _check_order() -> None:
    """Raise RuntimeError unless NumPy writes overlapping words one after the other, as `encode_uints` needs it.

    NumPy does so but does not promise it; a version that did not would give different tokens the same digest.
    """
    values = np.arange(1, 9001, dtype=np.uint32)  # more than NumPy's buffer of 8,192
    values = (values * np.uint32(2654435761)) >> (values * np.uint32(7) % np.uint32(32))  # of all widths, mixed
    octets, offsets = encode_uints(values, len(values))
    if octets[: offsets[-1]].tobytes() != b"".join(map(encode, values.tolist())):
        raise RuntimeError(f"NumPy {np.__version__} does not write overlapping words in order: use another version")


_check_order()
