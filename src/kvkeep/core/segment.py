"""Splits a prompt at separators into segments, whose digests do not depend on what is around them.

The digest of a segment is the SHA-256 of `cbor2.dumps((None, tuple of its tokens, extra keys), canonical=True)`: no
parent, so it can never be that of a chunk, which has one. Knows nothing about where a segment's KV may be reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from kvkeep.core import cbor
from kvkeep.core.key import Tokens, token_array


class Segment(NamedTuple):
    """The tokens [start, end) of a prompt, at least one, and their digest."""

    start: int
    end: int
    digest: bytes


def segments(tokens: Tokens, separator: Sequence[int], extra_keys: tuple[Any, ...] | None = None) -> list[Segment]:
    """Split tokens at each separator, from the left, and digest what lies between; separators belong to no segment.

    Where nothing lies between (at either end, between two separators, in an empty prompt) there is no segment; a
    prompt without a separator is one. `extra_keys` are what the KV depends on besides the tokens, such as an adapter
    or a salt. Raises ValueError for an empty separator and as `token_array` does.
    """
    words, needle = token_array(tokens), token_array(separator)
    if not needle.size:
        raise ValueError("a separator has at least one token")
    tail = cbor.encode(extra_keys)
    found, start = [], 0
    for at in [*_occurrences(words, needle), words.size]:
        if at > start:
            found.append(Segment(start, at, _digest(words[start:at], tail)))
        start = at + needle.size
    return found


def _occurrences(words: cbor.Words, needle: cbor.Words) -> list[int]:
    """Where needle stands in words, from the left, none overlapping the one before."""
    size = needle.size
    starts = np.flatnonzero(words[: max(0, words.size - size + 1)] == needle[0])
    for offset in range(1, size):
        starts = starts[words[starts + offset] == needle[offset]]
    apart: list[int] = []
    for at in starts.tolist():
        if not apart or at >= apart[-1] + size:
            apart.append(at)
    return apart


def _digest(words: cbor.Words, tail: bytes) -> bytes:
    octets, (_, end) = cbor.encode_uints(words, words.size)
    hasher = sha256(b"\x83" + cbor.encode(None) + cbor.array_head(words.size))
    hasher.update(octets.data[:end])
    hasher.update(tail)
    return hasher.digest()
