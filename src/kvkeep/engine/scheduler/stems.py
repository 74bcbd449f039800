"""Which requests begin with the same first block: the engine may let one of them read the blocks of another.

A request counts from its arrival on, whether or not it can be kept. Knows nothing about digests or lookups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Stems:
    """The first blocks of one engine's requests; `block_tokens` is the size of its smallest block.

    A shorter prompt may fill its block later: it shares with all requests whose block begins with it.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._stems: dict[str, tuple[int, ...]] = {}
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._short: Counter[int] = Counter()  # how many prompts of each length below a block's

    def add(self, name: str, tokens: Sequence[int]) -> None:
        """Adds a request with these tokens; one that is known stays as it is."""
        if name not in self._stems:
            stem = self._stems[name] = tuple(tokens[: self._block_tokens])
            self._counts[stem] += 1
            self._short.update([len(stem)] if len(stem) < self._block_tokens else [])

    def drop(self, name: str) -> None:
        """Drops a request that is over; one that is not known is no error."""
        stem = self._stems.pop(name, None)
        if stem is not None:
            self._counts[stem] -= 1
            if not self._counts[stem]:
                del self._counts[stem]
            if len(stem) < self._block_tokens:
                self._short -= Counter([len(stem)])

    def shared(self, name: str) -> bool:
        """Whether another request may begin with the same block as this known one."""
        stem = self._stems[name]
        short = len(stem) < self._block_tokens
        return short or self._counts[stem] > 1 or any(self._counts[stem[:length]] for length in self._short)
