"""A block with the pages of all its layers side by side is one page; whatever is not quite that stays apart."""

from __future__ import annotations

import pytest
import torch

from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.device import InlineStream, MemmoveDriver
from kvkeep.transfer.device.device import DeviceTransfer, Direction
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.tables import CopyJob, Int64Array
from kvkeep.transfer.pages import GroupCaches, across_layers, group_rows
from kvkeep.transfer.transfer import Blocks

BLOCKS, LAYERS, TOKENS = 6, 3, 4


def outermost(dtype: torch.dtype = torch.bfloat16, padding: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One allocation [blocks, layers, tokens, size], and each layer's view of it."""
    page = TOKENS * 8
    raw = torch.arange(BLOCKS * (LAYERS * page + padding), dtype=torch.int32).to(dtype)
    whole = raw.view(BLOCKS, -1)
    return whole, [whole[:, n * page : (n + 1) * page].unflatten(1, (TOKENS, 8)) for n in range(LAYERS)]


def of(caches: list[torch.Tensor], num_blocks: int = BLOCKS) -> GroupCaches:
    return GroupCaches({f"l{n}": one for n, one in enumerate(caches)}, num_blocks, TOKENS, 0)


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("backwards", [False, True])
def test_one_page_has_the_bytes_of_all_layers_in_the_order_of_the_memory(padding: int, backwards: bool):
    whole, layers = outermost(padding=padding)
    group = across_layers(of(layers[::-1] if backwards else layers))
    assert list(group.caches) == ["l0 to l2"]
    ((rows,),) = group_rows(group)
    page = whole[:, : LAYERS * TOKENS * 8].contiguous().view(torch.uint8)
    assert torch.equal(rows, page)
    assert rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_pages_may_be_interleaved_as_long_as_together_they_fill_the_block():
    heads = torch.arange(BLOCKS * 2 * LAYERS * TOKENS * 4, dtype=torch.int32).view(BLOCKS, 2, LAYERS, TOKENS, 4)
    group = across_layers(of([heads[:, :, n] for n in range(LAYERS)]))
    ((rows,),) = group_rows(group)
    assert torch.equal(rows, heads.view(BLOCKS, -1).view(torch.uint8))


def apart() -> list[torch.Tensor]:
    return [torch.zeros(BLOCKS, TOKENS, 8) for _ in range(LAYERS)]


def layers_outermost() -> list[torch.Tensor]:
    return list(torch.zeros(LAYERS, BLOCKS, TOKENS, 8))


def with_a_gap() -> list[torch.Tensor]:
    _, layers = outermost()
    return [layers[0], layers[2]]


def one_twice() -> list[torch.Tensor]:
    _, layers = outermost()
    return [layers[0], layers[0], layers[2]]


def of_two_allocations() -> list[torch.Tensor]:
    return [*outermost()[1][:2], outermost()[1][2]]


def overlapping_with_a_gap() -> list[torch.Tensor]:
    raw = torch.zeros(BLOCKS, 40)
    return [raw[:, 0:10], raw[:, 5:15], raw[:, 20:30]]


def halves_first() -> list[torch.Tensor]:
    return [torch.zeros(2, BLOCKS, TOKENS, 8) for _ in range(LAYERS)]


@pytest.mark.parametrize(
    "make",
    [
        apart,
        layers_outermost,
        with_a_gap,
        one_twice,
        of_two_allocations,
        overlapping_with_a_gap,
        halves_first,
        lambda: outermost()[1][:1],
    ],
)
def test_what_is_not_side_by_side_stays_apart(make):
    group = of(make())
    assert across_layers(group) is group


def test_other_blocks_than_the_groups_stay_apart():
    group = of(outermost()[1], num_blocks=BLOCKS // 2)
    assert across_layers(group) is group


class Counting(MemmoveDriver):
    """Remembers how many copies it was asked for, and of how many bytes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def copy(self, targets: Int64Array, sources: Int64Array, sizes: Int64Array, stream: int) -> None:
        self.sizes += sizes.tolist()
        super().copy(targets, sources, sizes, stream)


@pytest.mark.parametrize(("joined", "copies"), [(True, 2), (False, 2 * LAYERS)])
def test_the_copy_engine_takes_a_block_in_one_piece(joined: bool, copies: int):
    whole, layers = outermost()
    driver, group = Counting(), of(layers)
    transfer = DeviceTransfer(
        [across_layers(group) if joined else group],
        2 * TOKENS,
        lambda parts: (Direction(MemcpyCopier(parts, driver, lambda: 0), InlineStream()),) * 2,
    )
    memory = torch.zeros(transfer.shard.nbytes, dtype=torch.uint8).numpy()
    lease = Lease(memory, transfer.shard, (0,))
    transfer.start_gather([CopyJob([Blocks(0, 0, (4, 1))], lease)]).wait()
    assert len(driver.sizes) == copies
    wanted = whole[[2, 5]].clone(), whole[[4, 1]].clone()
    transfer.start_scatter([CopyJob([Blocks(0, 0, (2, 5))], lease)]).wait()
    assert not torch.equal(wanted[0], whole[[2, 5]])
    assert torch.equal(wanted[1], whole[[2, 5]])
