"""Moves a text's K to another position: which layers' K rotates, in which blocks, by how much.

V and what carries no position stay as they were stored. Knows nothing about leases, streams or how bytes come into the
blocks: K is rotated in them afterwards, or on its way there (`rope/scatter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from kvkeep.core.layout import ShardLayout
from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.pages import GroupCaches, storage_of
from kvkeep.transfer.rope.rotate import Pairing, Rotation, key_pages, rotate_blocks, rotation_between
from kvkeep.transfer.transfer import Blocks


class Keys(NamedTuple):
    """How K lies in a layer's cache, and by how much each pair rotates from one token to the next.

    `axes` and `packed` are those of `rotary.key_pages`; `frequencies`, float32 [pairs], those of `rope.frequencies`.
    """

    axes: str
    frequencies: torch.Tensor
    pairing: Pairing = Pairing()
    packed: str = ""


class Plane(NamedTuple):
    """K, or V, which does not rotate, in the range with index `range_`: a view [blocks, tokens, heads, head_size]."""

    pages: torch.Tensor
    range_: int
    rotates: bool


class Alike(NamedTuple):
    """Layers of one group whose K rotates alike, of one shape and dtype: their planes, each V behind its K."""

    group: int
    keys: Keys
    planes: list[Plane]


class Batch(NamedTuple):
    """One scatter: of the range with index `only` (None: all that have planes here); `rotation` None: plain."""

    only: int | None
    alike: Alike | None = None
    rotation: Rotation | None = None


class Rotator:
    """For the caches of `groups`, whose chunks are arranged as `shard`; a layer that `keys` does not name stays.

    Raises LayoutMismatch, naming the layer, for one that is not there or whose K cannot be rotated.
    """

    def __init__(self, groups: Sequence[GroupCaches], shard: ShardLayout, keys: Mapping[str, Keys]) -> None:
        if unknown := keys.keys() - shard.range_indexes.keys():
            raise LayoutMismatch(f"{min(unknown)}: K cannot be moved: there is no such layer")
        self.shard = shard
        self.alike: list[Alike] = []
        self.kinds: dict[int, int] = {}
        """Which of `alike` a range belongs to, by the range's index."""
        for group in groups:
            _check_apart(group.caches, keys)
        for name, index in shard.range_indexes.items():
            if name in keys:
                self._add(groups[shard.ranges[index].group], name, index, keys[name])

    def for_text(self, blocks: Sequence[Sequence[Blocks]], first_chunk: int, by: int) -> TextRotation:
        """The move by so many positions of a text's chunks from `first_chunk` on, which go to these blocks.

        Their tokens follow each other without a gap, as those of `Cut.blocks` do.
        """
        return TextRotation(self, blocks, first_chunk * self.shard.chunk_tokens, by)

    def _add(self, group: GroupCaches, name: str, index: int, keys: Keys) -> None:
        made, which = group.caches[name], self.shard.ranges[index].group
        cache = storage_of(made, made.dtype).as_strided(made.shape, made.stride(), made.storage_offset())
        pages = key_pages(name, cache, keys.axes, keys.packed)
        if pages.shape[:2] != (group.num_blocks, group.block_tokens):
            raise LayoutMismatch(f"{name}: K cannot be moved: shape {tuple(cache.shape)} is not in blocks of the group")
        if keys.pairing.start + 2 * len(keys.frequencies) > pages.shape[3]:
            raise LayoutMismatch(f"{name}: K cannot be moved: {len(keys.frequencies)} pairs do not fit a head of it")
        keys = keys._replace(frequencies=keys.frequencies.to(cache.device, torch.float32))
        same = (n for n, alike in enumerate(self.alike) if alike.group == which and _rotate_alike(alike, keys, pages))
        kind = self.kinds[index] = next(same, len(self.alike))
        if kind == len(self.alike):
            self.alike.append(Alike(which, keys, []))
        self.alike[kind].planes.append(Plane(pages, index, True))
        if "2" in keys.axes:
            self.alike[kind].planes.append(Plane(key_pages(name, cache, keys.axes, half=1), index, False))


class TextRotation:
    """The rotation of one text: of each token from `start` on, in the order of its blocks."""

    def __init__(self, rotator: Rotator, blocks: Sequence[Sequence[Blocks]], start: int, by: int) -> None:
        self._rotator = rotator
        self._blocks = [{blocks.group: blocks for blocks in chunk} for chunk in blocks]
        self._made = [self._rotation(alike, start, by) for alike in rotator.alike]

    def in_place(self, chunk: int, layers: range | None) -> None:
        """Rotates K of this chunk of the text, which is in its blocks, in these ranges (None: in all)."""
        for index in range(len(self._rotator.shard.ranges)) if layers is None else layers:
            kind = self._rotator.kinds.get(index)
            if kind is not None:
                alike, rotation = self._rotator.alike[kind], self._made[kind]
                start, end = (self._tokens(alike.group, count) for count in (chunk, chunk + 1))
                keys = next(plane for plane in alike.planes if plane.range_ == index and plane.rotates)
                ids = [int(block_id) for block_id in self._blocks[chunk][alike.group].block_ids]
                rotate_blocks(
                    keys.pages, ids, Rotation(rotation.cos[start:end], rotation.sin[start:end]), alike.keys.pairing
                )

    def batches(self, index: int | None, chunks: int) -> list[Batch]:
        """The scatters that bring the first `chunks` chunks to their place: range `index` of them, or (None) all."""
        kinds = self._rotator.kinds
        wanted = range(len(self._rotator.shard.ranges)) if index is None else (index,)
        plain = [Batch(index) for index in wanted if index not in kinds]
        rotated = []
        for kind in sorted({kinds[index] for index in wanted if index in kinds}):
            alike, rotation = self._rotator.alike[kind], self._made[kind]
            end = self._tokens(alike.group, chunks)
            rotated.append(Batch(index, alike, Rotation(rotation.cos[:end], rotation.sin[:end])))
        return plain + rotated

    def _rotation(self, alike: Alike, start: int, by: int) -> Rotation:
        pace, size = alike.keys.frequencies, self._rotator.shard.groups[alike.group].block_tokens
        first = start + self._blocks[0][alike.group].first * size
        # made where it is used: numbers that came from the host would wait for what is under way there
        stored = torch.arange(first, first + self._tokens(alike.group, len(self._blocks)), device=pace.device)
        return rotation_between((stored, pace), (stored + by, pace))

    def _tokens(self, group: int, chunks: int) -> int:
        """How many tokens the first `chunks` chunks have in their blocks of a group."""
        size = self._rotator.shard.groups[group].block_tokens
        return size * sum(len(blocks[group].block_ids) for blocks in self._blocks[:chunks])


def _check_apart(caches: Mapping[str, torch.Tensor], keys: Mapping[str, Keys]) -> None:
    """LayoutMismatch if K of a layer is another layer's too: it would be rotated twice."""
    seen: dict[int, str] = {}
    for name, cache in caches.items():
        other = seen.setdefault(cache.data_ptr(), name)
        if other != name and (name in keys or other in keys):
            raise LayoutMismatch(f"{name}: K cannot be moved: its cache is also that of {other}; register it once")


def _rotate_alike(alike: Alike, keys: Keys, pages: torch.Tensor) -> bool:
    mine, first = alike.keys, alike.planes[0].pages
    same = (mine.axes, mine.pairing, first.shape, first.dtype) == (keys.axes, keys.pairing, pages.shape, pages.dtype)
    return same and torch.equal(mine.frequencies, keys.frequencies)
