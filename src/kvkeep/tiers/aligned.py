"""Memory for transfers past the page cache, which must begin and end at a page."""

from __future__ import annotations

import mmap

import numpy as np

from kvkeep.core.units import ALIGN_NBYTES
from kvkeep.tiers.tier import Bytes


def aligned_bytes(nbytes: int) -> Bytes:
    """Zeroed memory that begins at a page, uint8 [nbytes]."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def is_aligned(memory: Bytes) -> bool:
    """Whether a direct transfer may use this memory."""
    return memory.__array_interface__["data"][0] % ALIGN_NBYTES == 0 and memory.nbytes % ALIGN_NBYTES == 0
