"""What each namespace in use is, in words: so that two engines that do not share are told why.

Pure. Knows nothing about chunks or sockets; namespaces are compared as bytes elsewhere, the words are for people only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from kvkeep.core.identity import told_apart

MOST = 64  # the ones named last
MAX_IDENTITY_CHARS = 16 << 10


class Named(NamedTuple):
    """A namespace as its last session told it: that one's name, and its identity for people."""

    name: str
    identity: str


@dataclass
class Namespaces:
    """The namespaces named last, the latest at the end; `changed` is called when one is named that was not known."""

    known: dict[bytes, Named] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None

    def name(self, namespace: bytes, name: str, identity: str) -> list[str]:
        """Notes one. Where it was not known: what tells it from the latest of this name, a field a line."""
        here = Named(name, identity[:MAX_IDENTITY_CHARS])
        like = _latest(self.known, name)
        was_known = self.known.pop(namespace, None) is not None
        self.known[namespace] = here
        self._bound()
        if was_known:
            return []
        self.changed()
        return [] if like is None else told_apart(here.identity, like.identity)

    def forget(self, namespace: bytes) -> None:
        """Nobody can find it any more."""
        if self.known.pop(namespace, None) is not None:
            self.changed()

    def recall(self, earlier: Mapping[bytes, Named]) -> list[str]:
        """Takes in what was known in an earlier life; for each that is new since then, what tells it from those."""
        lines = []
        for namespace, here in self.known.items():
            like = _latest(earlier, here.name)
            if like is not None and namespace not in earlier:
                lines.append("; ".join(told_apart(here.identity, like.identity)))
        self.known = {**{one: named for one, named in earlier.items() if one not in self.known}, **self.known}
        self._bound()
        return lines

    def _bound(self) -> None:
        for one in list(islice(self.known, max(0, len(self.known) - MOST))):
            del self.known[one]


def _latest(known: Mapping[bytes, Named], name: str) -> Named | None:
    return next((one for one in reversed(list(known.values())) if one.name == name), None)
