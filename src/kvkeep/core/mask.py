"""Masks: one bool a token of a prompt, as callers of a cache engine give and get them.

- **store mask**: True where a token's KV is to be stored. **token mask**: True where it is wanted. In both the False
  tokens are a prefix that somebody else has already, and it ends at a chunk's end: those chunks are part of the chain
  of digests, but are neither stored nor retrieved.
- **ret mask**: True exactly where a token's KV has arrived, in every layer and group.

Knows nothing about digests, chunks' places or who has what.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def store_mask(num_tokens: int, stored_tokens: int) -> Mask:
    """The mask of a prompt whose first `stored_tokens` need not be stored again; ValueError for more than it has."""
    if not 0 <= stored_tokens <= num_tokens:
        raise ValueError(f"{stored_tokens} of {num_tokens} tokens are stored")
    mask = np.ones(num_tokens, np.bool_)
    mask[:stored_tokens] = False
    return mask


def token_mask(num_tokens: int, computed_tokens: int, chunk_tokens: int) -> Mask:
    """The mask of a prompt whose first `computed_tokens` the engine has: only whole chunks of them are left out."""
    return store_mask(num_tokens, computed_tokens - computed_tokens % chunk_tokens)


def masked_tokens(mask: Sequence[bool] | npt.NDArray[Any] | None, num_tokens: int, chunk_tokens: int) -> int:
    """How many tokens a store or token mask leaves out, a multiple of `chunk_tokens`; None leaves out nothing.

    Takes whatever numpy reads as an array of bools. Raises ValueError, naming the position, unless it has one bool a
    token, all False ones before all True ones, and as many as fill whole chunks.
    """
    if mask is None:
        return 0
    bools = np.asarray(mask)
    if bools.shape != (num_tokens,):
        raise ValueError(f"a mask of shape {bools.shape} for {num_tokens} tokens")
    if bools.size and bools.dtype != np.bool_:
        raise ValueError(f"a mask of {bools.dtype}, not of bool")
    wanted = np.flatnonzero(bools)
    masked = int(wanted[0]) if wanted.size else num_tokens
    if wanted.size < num_tokens - masked:
        hole = masked + int(np.argmin(bools[masked:]))
        raise ValueError(f"token {hole} is masked behind token {masked}, which is not: False is for a prefix only")
    if masked % chunk_tokens:
        raise ValueError(f"{masked} masked tokens are not a multiple of chunk_tokens {chunk_tokens}")
    return masked


def ret_mask(num_tokens: int, chunk_tokens: int, chunks: Iterable[int]) -> Mask:
    """The mask of a prompt of whose chunks these, by number, have arrived; ValueError for one that is not whole."""
    mask = np.zeros(num_tokens, np.bool_)
    for number in chunks:
        start, end = number * chunk_tokens, (number + 1) * chunk_tokens
        if not 0 <= start < end <= num_tokens:
            raise ValueError(f"chunk {number} is not one of {num_tokens} tokens")
        mask[start:end] = True
    return mask
