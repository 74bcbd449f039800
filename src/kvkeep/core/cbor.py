"""Canonical CBOR (RFC 8949), as much of it as digests and namespaces need; it only encodes.

Byte for byte what `cbor2.dumps(value, canonical=True)` gives for the same value. Knows nothing about tokens,
chunks or identities: the callers give the values their meaning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP = (major << 5 for major in range(6))
_ONE_BYTE, _FOUR_BYTES = (
    0x18,
    0x1A,
)  # heads of the unsigned ints with so many bytes to follow; 0x19 is that of two

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

    An int is written into a slot of three bytes (head, high, low), one of 2**16 or more into two slots, and
    the bytes that its shortest form does not have are squeezed out in one pass. That pass costs by the gap,
    and text has few; scattering words of a table to summed offsets costs about three times as much.
    """
    firsts = np.arange(0, values.size, run)
    wide = np.flatnonzero(values > 0xFFFF)
    slots = values
    if wide.size:
        firsts += np.searchsorted(wide, firsts)
        wide += np.arange(wide.size)  # where the upper slots of the wide ints are among the slots
        slots = _split(values, wide)
    octets, keep = _slots(slots, wide)
    counted = np.uint16 if 5 * run < 1 << 16 else np.uint32  # numpy sums the narrower one faster
    nbytes = np.add.reduceat(keep.view(np.uint8).ravel(), 3 * firsts, dtype=counted)
    return octets[keep], [0, *np.cumsum(nbytes, dtype=np.int64).tolist()]


def _split(values: Words, uppers: npt.NDArray[np.intp]) -> Words:
    """Give each int of more than 16 bits two slots: the upper half at `uppers`, the lower half after it."""
    slots = np.empty(values.size + uppers.size, np.uint32)
    whole = np.ones(slots.size, np.bool_)
    whole[uppers + 1] = False
    slots[whole] = values
    slots[uppers + 1] = slots[uppers] & np.uint32(0xFFFF)
    slots[uppers] >>= np.uint32(16)
    return slots


def _slots(slots: Words, uppers: npt.NDArray[np.intp]) -> tuple[Octets, npt.NDArray[np.bool_]]:
    """Fill the three bytes of each slot, and say which of them to keep: uint8 and bool [slots, 3]."""
    has_head, has_high = slots > 23, slots > 0xFF
    if uppers.size:
        has_head[uppers] = has_high[uppers] = has_high[uppers + 1] = True
        has_head[uppers + 1] = False
    octets = np.empty((slots.size, 3), np.uint8)
    np.add(has_high.view(np.uint8), np.uint8(_ONE_BYTE), out=octets[:, 0])
    octets[uppers, 0] = _FOUR_BYTES
    least_first = slots.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    octets[:, 1] = least_first[:, 1]
    octets[:, 2] = least_first[:, 0]
    keep = np.ones((slots.size, 3), np.bool_)
    keep[:, 0] = has_head
    keep[:, 1] = has_high
    return octets, keep
