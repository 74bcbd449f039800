"""The digests of prompts. Remembers the last few, so that lookup, retrieve and store of one prompt hash it once, and a
prompt that has grown costs only its new chunks.

Knows nothing about the store. Any thread may ask: a remembered prompt is never changed, only replaced.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvkeep.core import cbor
from kvkeep.core.cbor import Words
from kvkeep.core.key import Chain, Tokens, token_array

REMEMBERED = 8

Extra = tuple[str | int | bytes, ...]
"""What a prompt's bytes depend on besides its tokens, such as an adapter's name or a tenant's salt: in every digest."""


class Prompt(NamedTuple):
    """A copy of the tokens of a prompt's whole chunks, what else its digests depend on (encoded), its digests."""

    tokens: Words
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
        whole = token_array(tokens[: len(tokens) // self._chunk_tokens * self._chunk_tokens])
        hashed = cbor.encode(extra)  # and not `extra`: in Python True equals 1, in a digest it does not
        shared, best = 0, None
        for prompt in self._known:
            count = self._shared(prompt, whole, hashed)
            if count > shared:
                shared, best = count, prompt
        digests = best.digests[:shared] if best is not None else []
        if shared * self._chunk_tokens == len(whole):
            return digests
        root = digests[-1] if digests else self._root
        chain = Chain(self._chunk_tokens, root, None if extra is None else lambda _start, _end: extra)
        digests += chain.extend(whole[shared * self._chunk_tokens :])
        outgrown = best if best is not None and shared == len(best.digests) else None
        # a copy: the caller may change its array
        known = Prompt(whole.copy(), hashed, digests)
        self._known = (known, *(prompt for prompt in self._known if prompt is not outgrown))[:REMEMBERED]
        return digests[:]

    def _shared(self, known: Prompt, whole: Words, extra: bytes) -> int:
        """How many chunks a known prompt has in common with another one."""
        length, head = min(len(known.tokens), len(whole)), self._chunk_tokens
        if known.extra != extra or not np.array_equal(known.tokens[:head], whole[:head]):
            return 0
        differs = known.tokens[:length] != whole[:length]
        return (int(differs.argmax()) if differs.any() else length) // self._chunk_tokens
