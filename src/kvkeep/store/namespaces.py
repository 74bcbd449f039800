"""Descriptions of the namespaces in use, so that the log can say why two engines do not share.

Pure, and for people only: elsewhere namespaces are compared as bytes. Knows nothing about chunks or sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from kvkeep.core.identity import told_apart

MOST = 64  # namespaces, those named last
MAX_NAME_CHARS = 256
MAX_IDENTITY_NBYTES = 16 << 10  # as UTF-8; those of `MOST` namespaces fit one answer


class Named(NamedTuple):
    """A namespace as its last session described it: the session's name and identity; see `plainly_named`."""

    name: str
    identity: str


def plain(text: str) -> str:
    """The text on one line, with what a terminal would obey (ESC, a new line, a change of direction) escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def plain_name(name: str) -> str:
    """A client's name, on one line and cut, so that it can be logged and shown."""
    return plain(name[:MAX_NAME_CHARS])[:MAX_NAME_CHARS]


def plain_identity(identity: str) -> str:
    """A client's identity, a field a line and cut, so that it can be shown."""
    lines = identity[:MAX_IDENTITY_NBYTES].split("\n")
    return "\n".join(map(plain, lines)).encode()[:MAX_IDENTITY_NBYTES].decode(errors="ignore")


def plainly_named(name: str, identity: str) -> Named:
    """A description that can be logged, shown and sent, whoever made it."""
    return Named(plain_name(name), plain_identity(identity))


@dataclass
class Namespaces:
    """The namespaces named last, the latest at the end; `changed` is called when one is new or forgotten."""

    known: dict[bytes, Named] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None

    def name(self, namespace: bytes, name: str, identity: str) -> list[str]:
        """Note a namespace. If it is new, return how it differs from the latest of this name, a field a line."""
        here = plainly_named(name, identity)
        like = _latest(self.known, here.name)
        was_known = self.known.pop(namespace, None) is not None
        self.known[namespace] = here
        self._bound()
        if was_known:
            return []
        self.changed()
        return [] if like is None else told_apart(here.identity, like.identity)

    def forget(self, namespace: bytes) -> None:
        """Drop a namespace whose chunks nobody can find any more."""
        if self.known.pop(namespace, None) is not None:
            self.changed()

    def recall(self, earlier: Mapping[bytes, Named]) -> list[str]:
        """Add what an earlier store knew; for each namespace that is new since then, how it differs from that."""
        earlier = {namespace: plainly_named(*named) for namespace, named in earlier.items()}
        lines = []
        for namespace, here in self.known.items():
            like = _latest(earlier, here.name)
            if like is not None and namespace not in earlier:
                lines.append("; ".join(told_apart(here.identity, like.identity)))
        self.known = {
            **{namespace: named for namespace, named in earlier.items() if namespace not in self.known},
            **self.known,
        }
        self._bound()
        return lines

    def _bound(self) -> None:
        for namespace in list(islice(self.known, max(0, len(self.known) - MOST))):
            del self.known[namespace]


def _latest(known: Mapping[bytes, Named], name: str) -> Named | None:
    return next((named for named in reversed(list(known.values())) if named.name == name), None)
