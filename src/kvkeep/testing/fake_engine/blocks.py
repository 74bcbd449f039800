"""The fake engine's block pool and prefix cache: blocks by id, counted references, names of full blocks.

Knows nothing about requests, tensors or kvkeep. Block 0 is the null block and is never lent. A block's name is its
group and all tokens up to its end, so there are no collisions to think of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Name = tuple[int, tuple[int, ...]]


class FakeBlocks:
    """`num_blocks` blocks, the null block included."""

    def __init__(self, num_blocks: int) -> None:
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._uses = [0] * num_blocks
        self._names: dict[int, Name] = {}
        self.cached: dict[Name, int] = {}

    @property
    def free_count(self) -> int:
        """How many blocks nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Blocks for new content, least recently freed first; they lose their names."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.forget(taken)
        for block_id in taken:
            self._uses[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more use of each of these blocks (the null block is left out)."""
        for block_id in block_ids:
            if block_id:
                self._free.pop(block_id, None)
                self._uses[block_id] += 1

    def give_back(self, block_ids: Sequence[int]) -> None:
        """One use less of each of these blocks, the last one first; content and names stay until they are taken."""
        for block_id in reversed(block_ids):
            if block_id:
                self._uses[block_id] -= 1
                assert self._uses[block_id] >= 0, f"block {block_id} was given back twice"
                if not self._uses[block_id]:
                    self._free[block_id] = None

    def name(self, block_id: int, name: Name) -> None:
        """The block is full, or will be at the end of this step; another block with this name keeps it."""
        if name not in self.cached and block_id not in self._names:
            self.cached[name] = block_id
            self._names[block_id] = name

    def forget(self, block_ids: Iterable[int]) -> None:
        """These blocks are found by no name any more."""
        for block_id in block_ids:
            name = self._names.pop(block_id, None)
            if name is not None:
                del self.cached[name]

    def idle(self) -> bool:
        """Whether nobody uses any block."""
        return not any(self._uses)

    def table(self, group: int, prefix: tuple[int, ...], first_seen: int, size: int) -> list[int] | None:
        """A block table for `prefix` out of the cache, null where its tokens cannot see; None if a block is missing."""
        gone = first_seen // size
        names = [(group, prefix[: (place + 1) * size]) for place in range(gone, len(prefix) // size)]
        if not all(name in self.cached for name in names):
            return None
        return [0] * gone + [self.cached[name] for name in names]
