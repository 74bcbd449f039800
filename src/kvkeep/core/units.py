"""Sizes that every part of kvkeep agrees on, each said once (bytes)."""

from __future__ import annotations

ALIGN_NBYTES = 4096  # ranges, extents and records start at multiples of it: a page of memory, a sector of any disk
SUM_NBYTES = 16  # the checksum of a range: xxh3-128
NAMESPACE_NBYTES = 16  # the digest of an identity, cut short
DIGEST_NBYTES = 32  # the SHA-256 of a chunk's tokens and of all before them
KEY_NBYTES = NAMESPACE_NBYTES + DIGEST_NBYTES
BOOT_NBYTES = 16  # the random token of a store's start
