"""Which adapters an engine's ranks have loaded, by content, and whether an adapter's name stands for one content alone.

The engine's own prefix cache knows an adapter by name and path. So where two contents have been computed under the same
ones, a request may get blocks of either from it, and nothing of that adapter is kept until that cache is emptied. Knows
nothing about files or tensors, nor about what is done with a request.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

MAX_ADAPTERS = 4096


class Adapter(NamedTuple):
    """An adapter as a request names it. `anew`: each step that computes the request loads it again."""

    number: int
    name: str
    path: str
    anew: bool = False


class LoadedAdapter(NamedTuple):
    """One rank has loaded an adapter; `digest` is that of its tensors, "" as long as it is not known."""

    rank: int
    number: int
    digest: str


class Resident(NamedTuple):
    """The numbers of the adapters that one rank has just now; of others the next load is still to come."""

    rank: int
    numbers: frozenset[int]


class Expected(NamedTuple):
    """What each rank must have loaded for a request to get what was kept."""

    number: int
    digests: tuple[str, ...]


class Adapters:
    """What the ranks of one engine have told of their loads, and which contents have been computed with."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = range(ranks)
        self._digests: OrderedDict[int, dict[int, str]] = OrderedDict()
        self._resident: dict[int, frozenset[int]] = {}
        self._contents: dict[int, bytes | None] = {}  # what was made of the digests: each request asks for it
        self._used: dict[int, set[Adapter]] = {}
        self._computed: dict[tuple[object, ...], set[bytes]] = {}
        self._unseen: set[int] = set()  # the numbers of what was loaded or used since the last report

    def told(self, loads: Iterable[LoadedAdapter], resident: Iterable[Resident]) -> bool:
        """A step is over; takes in what ranks have loaded by its end.

        False if whatever was still the same before is so now.
        """
        for rank, number, digest in loads:
            digests = self._digests.setdefault(number, {})
            if digests.get(rank) == digest == "":
                self._count(b"", number)  # of the load before this one nothing will be known
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
        """The engine's own cache holds nothing; `used` are the adapters of requests that go on."""
        self._computed.clear()
        self._used = {}
        for adapter in used:
            self._used.setdefault(adapter.number, set()).add(adapter)
        self._unseen = set(self._used)

    def begin(self, adapter: Adapter) -> bytes | None:
        """What a request with this adapter begins with, on all ranks together; None if that is in doubt.

        It is before each load, and where the engine's own cache may hold blocks of another content of this name.
        """
        self._used.setdefault(adapter.number, set()).add(adapter)
        self._unseen.add(adapter.number)
        resident = all(adapter.number in self._resident.get(rank, frozenset()) for rank in self._ranks)
        content = self._content(adapter.number)
        return content if resident and not adapter.anew and self.is_still(adapter, content) else None

    def is_still(self, adapter: Adapter, content: bytes | None) -> bool:
        """Whether nothing else has been loaded in its place, nor computed under its name."""
        return self._content(adapter.number) == content and not self._computed.get(adapter[1:3], set()) - {content}

    def expected(self, adapter: Adapter) -> Expected:
        """What each rank must have for a request to get what was kept under this adapter's content."""
        digests = self._digests.get(adapter.number, {})
        return Expected(adapter.number, tuple(digests.get(rank, "") for rank in self._ranks))

    def _count(self, content: bytes, number: int) -> None:
        """Requests with the adapter of this number have been computed with this content."""
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
