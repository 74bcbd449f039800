"""Names of chunks for people: `model@world@rank@digest@dtype[@layers][@tag=value]*`. Never a key: nothing is looked up
by one.

In every field %, @, =, spaces and what is not printable ASCII are written as %XX of their UTF-8, so that each name has
one text and each text one name. `layers` is one layer, as in `@7`, or a range with both ends, as in `@0-15`.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

_SAFE = "!\"#$&'()*+,/:;<>?[\\]^`{|}"  # what quote would escape besides; letters, digits and _.-~ it never does
_NUMBER = "0|[1-9][0-9]*"
_TEXT = re.compile(
    f"(?P<model>[^@=]*)@(?P<world>{_NUMBER})@(?P<rank>{_NUMBER})@(?P<digest>(?:[0-9a-f]{{2}})*)@(?P<dtype>[^@=]*)"
    f"(?:@(?P<first>{_NUMBER})(?:-(?P<last>{_NUMBER}))?)?(?P<tags>(?:@[^@=]*=[^@=]*)*)"
)


class ChunkName(NamedTuple):
    """What people want to know of a chunk, or of its layers [first, last]; tags keep their order."""

    model: str
    world: int
    rank: int
    digest: bytes
    dtype: str
    layers: tuple[int, int] | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        fields = [_escaped(self.model), str(self.world), str(self.rank), self.digest.hex(), _escaped(self.dtype)]
        if self.layers is not None:
            first, last = self.layers
            fields.append(str(first) if first == last else f"{first}-{last}")
        fields += [f"{_escaped(tag)}={_escaped(value)}" for tag, value in self.tags]
        return "@".join(fields)


def parse_name(text: str) -> ChunkName:
    """Read a name back; ValueError for a text that no name has."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.80} is not model@world@rank@digest@dtype[@layers][@tag=value]*")
    first, last = found["first"], found["last"] or found["first"]
    name = ChunkName(
        model=unquote(found["model"]),
        world=int(found["world"]),
        rank=int(found["rank"]),
        digest=bytes.fromhex(found["digest"]),
        dtype=unquote(found["dtype"]),
        layers=None if first is None else (int(first), int(last)),
        tags=tuple(_tag(part) for part in found["tags"].split("@")[1:]),
    )
    if str(name) != text:
        raise ValueError(f"{text!r:.80} is escaped in another way than names are")
    return name


def _escaped(text: str) -> str:
    return quote(text, safe=_SAFE)


def _tag(part: str) -> tuple[str, str]:
    tag, value = part.split("=")
    return unquote(tag), unquote(value)
