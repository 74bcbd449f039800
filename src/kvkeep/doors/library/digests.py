"""The digests of prompts, remembered for the last few: a lookup, a retrieve and a store of one prompt hash it once, and
a prompt that has grown costs only its new chunks.

Knows nothing about the store. Any thread may ask: what is remembered is never changed, only replaced.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvkeep.core import cbor
from kvkeep.core.cbor import Words
from kvkeep.core.key import Chain, Tokens, token_array

REMEMBERED = 8

Extra = tuple[str | int | bytes, ...]
"""What a prompt's bytes depend on besides its tokens, as an adapter's name or a tenant's salt: part of every digest."""


class Prompt(NamedTuple):
    """A copy of a prompt's whole chunks of tokens, what else its digests depend on (as it is hashed), its digests."""

    words: Words
    extra: bytes
    digests: list[bytes]


class Prompts:
    """Digests of chunks of `chunk_tokens`, chained from `root`."""

    def __init__(self, chunk_tokens: int, root: bytes) -> None:
        self._chunk_tokens = chunk_tokens
        self._root = root
        self._known: tuple[Prompt, ...] = ()

    def digests(self, tokens: Tokens, extra: Extra | None) -> list[bytes]:
        """The digest of every whole chunk of `tokens`. Raises ValueError as `token_array` does."""
        words = token_array(tokens[: len(tokens) // self._chunk_tokens * self._chunk_tokens])
        hashed = cbor.encode(extra)  # and not `extra`: in Python True equals 1, in a digest it does not
        shared, best = 0, None
        for one in self._known:
            count = self._shared(one, words, hashed)
            if count > shared:
                shared, best = count, one
        digests = best.digests[:shared] if best is not None else []
        if shared * self._chunk_tokens == len(words):
            return digests
        root = digests[-1] if digests else self._root
        chain = Chain(self._chunk_tokens, root, None if extra is None else lambda _start, _end: extra)
        digests += chain.extend(words[shared * self._chunk_tokens :])
        outgrown = best if best is not None and shared == len(best.digests) else None
        # a copy: the caller may change its array
        known = Prompt(words.copy(), hashed, digests)
        self._known = (known, *(one for one in self._known if one is not outgrown))[:REMEMBERED]
        return digests[:]

    def _shared(self, one: Prompt, words: Words, extra: bytes) -> int:
        """How many chunks a known prompt has in common with another one."""
        length, head = min(len(one.words), len(words)), self._chunk_tokens
        if one.extra != extra or not np.array_equal(one.words[:head], words[:head]):
            return 0
        differs = one.words[:length] != words[:length]
        return (int(differs.argmax()) if differs.any() else length) // self._chunk_tokens
