"""What every `Transfer` must do, as functions that a third party can call on its own: one case, one check, any device.

Knows nothing about how a cache is arranged: a case reads and writes pages as bytes. Each check raises AssertionError
with what is wrong; `CHECKS` are all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kvkeep.core.units import SUM_NBYTES
from kvkeep.errors import BlockError
from kvkeep.memory.pool import Bytes, Lease
from kvkeep.transfer.transfer import NULL_BLOCK, Blocks, Transfer

GUARD_NBYTES = 4096


def _empty(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)


@dataclass(frozen=True)
class TransferCase:
    """A transfer over a cache, and a way round it: `read(group, layer)` and `write(group, layer, pages)` copy all pages
    of a layer as uint8 (num_blocks[group], page bytes), in the order of the engine's own bytes (K, then V).

    Every group must have at least twice as many blocks as a chunk, the null block not counted. `allocate`
    gives a chunk's memory and `pieces` says how it is page-locked, for transfers that ask that of it (see `Lease`).
    """

    transfer: Transfer
    num_blocks: Sequence[int]
    read: Callable[[int, int], Bytes]
    write: Callable[[int, int, Bytes], None]
    allocate: Callable[[int], Bytes] = _empty
    pieces: tuple[int, ...] = ()


Check = Callable[[TransferCase], None]


def check_round_trip(case: TransferCase) -> None:
    """What was gathered arrives byte for byte in other blocks; no other block and no byte beside the lease changes."""
    before = _filled(case, seed=1)
    memory, lease = _memory(case)
    sources, targets = _picks(case)
    sums = case.transfer.gather(sources, lease, True)
    assert _pages(case) == before, "a gather changed the cache"
    assert not (memory[:GUARD_NBYTES] != 0xA5).any(), "a gather wrote before its lease"
    assert not (memory[-GUARD_NBYTES:] != 0xA5).any(), "a gather wrote behind its lease"
    kept = bytes(memory)
    assert case.transfer.scatter(lease, targets, sums), "the sums of an untouched chunk do not hold"
    assert bytes(memory) == kept, "a scatter changed the chunk"
    assert _pages(case) == _moved(case, before, sources, targets), "a scatter brought other bytes, or touched others"


def check_arrangement(case: TransferCase) -> None:
    """A range is its pages in the order of the blocks, all K then all V, then zeros; the sums are xxh3-128 over all."""
    before = _filled(case, seed=2)
    shard = case.transfer.shard
    _, lease = _memory(case)
    sources, _ = _picks(case)
    sums = case.transfer.gather(sources, lease, True)
    ids = {run.group: list(run.block_ids) for run in sources}
    assert len(sums) == SUM_NBYTES * len(shard.ranges), "there is not one sum of 16 bytes a range"
    for number, (range_, view) in enumerate(zip(shard.ranges, lease.views(), strict=True)):
        pages = np.frombuffer(before[range_.group, range_.layer], np.uint8).reshape(case.num_blocks[range_.group], -1)
        parts, start = [], 0
        for nbytes in shard.groups[range_.group].layers[range_.layer].part_nbytes:
            parts.append(pages[ids[range_.group], start : start + nbytes].tobytes())
            start += nbytes
        assert bytes(view[: range_.nbytes]) == b"".join(parts), f"range {number} is not the pages in their order"
        assert not view[range_.nbytes :].any(), f"the padding of range {number} is not zero"
        sum_ = sums[number * SUM_NBYTES : (number + 1) * SUM_NBYTES]
        assert sum_ == xxhash.xxh3_128_digest(view.tobytes()), f"the sum of range {number} is another"


def check_pieces(case: TransferCase) -> None:
    """A chunk that is gathered block by block equals one gathered at once, and can be scattered in part."""
    before = _filled(case, seed=3)
    whole, whole_lease = _memory(case)
    pieces, pieces_lease = _memory(case)
    sources, targets = _picks(case)
    sums = case.transfer.gather(sources, whole_lease, True)
    singles = [Blocks(g, first + n, (ids[n],)) for g, first, ids in sources for n in range(len(ids))]
    for number, run in enumerate(singles):
        last = number == len(singles) - 1
        got = case.transfer.gather([run], pieces_lease, last)
        assert got == (sums if last else b""), "sums are for the piece that seals, of all ranges"
    assert bytes(whole) == bytes(pieces), "pieces make another chunk"
    group, first, ids = targets[0]
    part = [Blocks(group, first + 1, ids[1:])] if len(ids) > 1 else [targets[0]]
    origin = [Blocks(group, part[0].first, sources[0].block_ids[-len(part[0].block_ids) :])]
    assert case.transfer.scatter(whole_lease, part, b""), "a scatter without sums has nothing to fail on"
    assert _pages(case) == _moved(case, before, origin, part), "a part of a chunk is scattered from its own place"


def check_layers(case: TransferCase) -> None:
    """A chunk that is gathered layer by layer equals one gathered at once, sums included; a scatter of one layer writes
    that layer alone and looks at no other's sum.
    """
    before = _filled(case, seed=6)
    whole, whole_lease = _memory(case)
    parts, parts_lease = _memory(case)
    sources, targets = _picks(case)
    sums = case.transfer.gather(sources, whole_lease, True)
    ranges = case.transfer.shard.ranges
    singles = [range(number, number + 1) for number in range(len(ranges))]
    got = [case.transfer.gather(sources, parts_lease, True, layers) for layers in singles]
    assert b"".join(got) == sums, "the sums of the layers are not those of the chunk"
    assert bytes(whole) == bytes(parts), "layers make another chunk"
    last = ranges[-1]
    for number, view in enumerate(whole_lease.views()):
        view[0] ^= number < len(ranges) - 1  # every range but the last is broken
    assert case.transfer.scatter(whole_lease, targets, got[-1], singles[-1]), "a layer fails for another one's bytes"
    after, moved = _pages(case), _moved(case, before, sources, targets)
    wanted = {**before, (last.group, last.layer): moved[last.group, last.layer]}
    assert after == wanted, "a layer that is scattered alone brings other bytes, or touches other layers"


def check_flipped_bits(case: TransferCase) -> None:
    """One flipped bit anywhere in a range, its padding included, fails the scatter before it writes anything."""
    _filled(case, seed=4)
    _, lease = _memory(case)
    sources, targets = _picks(case)
    sums = case.transfer.gather(sources, lease, True)
    before = _pages(case)
    for number, (range_, view) in enumerate(zip(case.transfer.shard.ranges, lease.views(), strict=True)):
        for place in {0, range_.nbytes // 2, range_.nbytes - 1, range_.padded_nbytes - 1}:
            bit = np.uint8(1 << (place + number) % 8)
            view[place] ^= bit
            assert not case.transfer.scatter(lease, targets, sums), f"byte {place} of range {number} is not under a sum"
            view[place] ^= bit
    assert not case.transfer.scatter(lease, targets, sums[:-1]), "sums that are cut short are taken for good ones"
    assert _pages(case) == before, "a scatter that failed has written"
    assert case.transfer.scatter(lease, targets, sums), "the bits are back and the sums do not hold"


def check_wrong_blocks(case: TransferCase) -> None:
    """A block that does not exist, the null block, a destination named twice or a place outside is an assertion."""
    for group, count in enumerate(case.num_blocks):
        places = case.transfer.shard.blocks(group)
        for wrong in (
            [Blocks(group, 0, (count,))],
            [Blocks(group, 0, (-1,))],
            [Blocks(group, 0, (NULL_BLOCK,))],
            [Blocks(group, places, (1,))],
            [Blocks(group, -1, (1,))],
            [Blocks(group, 0, tuple(range(1, places + 2)))],
        ):
            assert _refuses(case.transfer, wrong, unique=False), f"{wrong} passes the check"
        twice = [Blocks(group, 0, (1,)), Blocks(group, 0, (1,))]
        assert _refuses(case.transfer, twice, unique=True), "a destination may be named twice"
        assert not _refuses(case.transfer, twice, unique=False), "a source may be named twice and is refused"


CHECKS: tuple[Check, ...] = (
    check_round_trip,
    check_arrangement,
    check_pieces,
    check_layers,
    check_flipped_bits,
    check_wrong_blocks,
)


def _refuses(transfer: Transfer, blocks: Sequence[Blocks], unique: bool) -> bool:
    try:
        transfer.check(blocks, unique)
    except BlockError:
        return True
    return False


def _filled(case: TransferCase, seed: int) -> dict[tuple[int, int], bytes]:
    """Random bytes in every page; all pages as they are now."""
    random = np.random.default_rng(seed)
    for group, layout in enumerate(case.transfer.shard.groups):
        for layer, layer_layout in enumerate(layout.layers):
            case.write(
                group, layer, random.integers(0, 256, (case.num_blocks[group], layer_layout.page_nbytes), np.uint8)
            )
    return _pages(case)


def _pages(case: TransferCase) -> dict[tuple[int, int], bytes]:
    groups = case.transfer.shard.groups
    return {
        (group, layer): case.read(group, layer).tobytes()
        for group, layout in enumerate(groups)
        for layer in range(len(layout.layers))
    }


def _memory(case: TransferCase) -> tuple[Bytes, Lease]:
    """A chunk's shard between two guards, all of it 0xA5, and a lease on it."""
    shard = case.transfer.shard
    memory = case.allocate(shard.nbytes + 2 * GUARD_NBYTES)
    memory[:] = 0xA5
    return memory, Lease(memory[GUARD_NBYTES:-GUARD_NBYTES], shard, case.pieces)


def _picks(case: TransferCase) -> tuple[list[Blocks], list[Blocks]]:
    """A chunk's blocks in every group, scattered over the cache, and as many others; the last block is among them."""
    random = np.random.default_rng(5)
    sources, targets = [], []
    for group, count in enumerate(case.num_blocks):
        per_chunk = case.transfer.shard.blocks(group)
        assert count > 2 * per_chunk, "the case has too few blocks"
        ids = [count - 1, *(int(block_id) for block_id in random.permutation(np.arange(1, count - 1)))]
        sources.append(Blocks(group, 0, tuple(ids[:per_chunk])))
        targets.append(Blocks(group, 0, tuple(ids[per_chunk : 2 * per_chunk])))
    return sources, targets


def _moved(
    case: TransferCase, before: dict[tuple[int, int], bytes], sources: Sequence[Blocks], targets: Sequence[Blocks]
) -> dict[tuple[int, int], bytes]:
    """The pages after `sources` were copied to `targets`, worked out independently."""
    moved = {}
    for (group, layer), raw in before.items():
        pages = np.frombuffer(raw, np.uint8).reshape(case.num_blocks[group], -1).copy()
        for source, target in zip(sources, targets, strict=True):
            if source.group == group:
                for old, new in zip(source.block_ids, target.block_ids, strict=True):
                    pages[new] = pages[old]
        moved[group, layer] = pages.tobytes()
    return moved
