"""What each namespace in use is, in words: so that two engines that do not share are told why.

Pure. Knows nothing about chunks or sockets; namespaces are compared as bytes elsewhere, the words are for people only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """The namespaces named last, the latest at the end."""

    known: dict[bytes, Named] = field(default_factory=dict)

    def name(self, namespace: bytes, name: str, identity: str) -> list[str]:
        """Notes one. Where it was not known: what tells it from the latest of this name, a field a line."""
        here = Named(name, identity[:MAX_IDENTITY_CHARS])
        like = next((one for one in reversed(self.known.values()) if one.name == name), None)
        was_known = self.known.pop(namespace, None) is not None
        self.known[namespace] = here
        if len(self.known) > MOST:
            del self.known[next(iter(self.known))]
        return [] if was_known or like is None else told_apart(here.identity, like.identity)
