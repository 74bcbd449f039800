"""Knows the content of each adapter that an engine's ranks have loaded, and whether a name has had two contents.

vLLM's own prefix cache knows an adapter by name and path. Where KV of two contents has been computed under the same
name and path, a request may get blocks of either from that cache; so nothing is kept of that adapter until the cache
is emptied.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

MAX_ADAPTERS = 4096


class Adapter(NamedTuple):
    """An adapter as a request names it (`number`: vLLM's id). `anew`: each step of the request loads it again."""

    number: int
    name: str
    path: str
    anew: bool = False


class LoadedAdapter(NamedTuple):
    """A rank has loaded an adapter; `digest` is that of its tensors, "" until it is known."""

    rank: int
    number: int
    digest: str


class Resident(NamedTuple):
    """The adapters that a rank has in memory now; before it uses another one it loads it."""

    rank: int
    numbers: frozenset[int]


class Expected(NamedTuple):
    """The digest that each rank's adapter must have for a request to reuse chunks."""

    number: int
    digests: tuple[str, ...]


class Adapters:
    """What the ranks of an engine have loaded, and which contents have computed KV under which name."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = range(ranks)
        self._digests: OrderedDict[int, dict[int, str]] = OrderedDict()
        self._resident: dict[int, frozenset[int]] = {}
        self._contents: dict[int, bytes | None] = {}  # made of all ranks' digests
        self._used: dict[int, set[Adapter]] = {}
        self._computed: dict[tuple[object, ...], set[bytes]] = {}
        self._unseen: set[int] = set()  # loaded or used since the last report

    def take(self, loads: Iterable[LoadedAdapter], resident: Iterable[Resident]) -> bool:
        """Take in what ranks have loaded by the end of a step; False if that changes nothing for any adapter."""
        for rank, number, digest in loads:
            digests = self._digests.setdefault(number, {})
            if digests.get(rank) == digest == "":
                self._count(b"", number)  # loaded again before its digest was known: that content never will be
            digests[rank] = digest
            self._digests.move_to_end(number)
            self._contents.pop(number, None)
            self._unseen.add(number)
            if len(self._digests) > MAX_ADAPTERS:
                self._contents.pop(self._digests.popitem(last=False)[0], None)
        self._resident.update(dict(resident))
        unseen, self._unseen = self._unseen, set()
        for number in unseen:
            content = self._content(number)
            if content is not None:
                self._count(content, number)
        return bool(unseen)

    def emptied(self, used: Iterable[Adapter]) -> None:
        """Note that the engine's own cache is empty; `used` are the adapters of requests that go on."""
        self._computed.clear()
        self._used = {}
        for adapter in used:
            self._used.setdefault(adapter.number, set()).add(adapter)
        self._unseen = set(self._used)

    def begin(self, adapter: Adapter) -> bytes | None:
        """Return the adapter's content on all ranks, for a request that begins; None if it is in doubt.

        It is in doubt before each load, and while the engine's own cache may hold blocks of another content.
        """
        self._used.setdefault(adapter.number, set()).add(adapter)
        self._unseen.add(adapter.number)
        resident = all(adapter.number in self._resident.get(rank, frozenset()) for rank in self._ranks)
        content = self._content(adapter.number)
        return content if resident and not adapter.anew and self.is_still(adapter, content) else None

    def is_still(self, adapter: Adapter, content: bytes | None) -> bool:
        """True if no other content has been loaded in its place or computed under its name."""
        return self._content(adapter.number) == content and not self._computed.get(adapter[1:3], set()) - {content}

    def expected(self, adapter: Adapter) -> Expected:
        """Return the digests that ranks must have for a request to reuse chunks of this adapter's content."""
        digests = self._digests.get(adapter.number, {})
        return Expected(adapter.number, tuple(digests.get(rank, "") for rank in self._ranks))

    def _count(self, content: bytes, number: int) -> None:
        """Note that requests with this adapter have been computed with this content."""
        for adapter in self._used.get(number, ()):
            self._computed.setdefault(adapter[1:3], set()).add(content)

    def _content(self, number: int) -> bytes | None:
        if number not in self._digests:
            return None
        if number not in self._contents:
            digests = self.expected(Adapter(number, "", "")).digests
            whole = hashlib.sha256(json.dumps(digests).encode()).digest()
            self._contents[number] = whole if all(digests) else None
        return self._contents[number]
