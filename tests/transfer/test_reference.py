from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import xxhash

from kvkeep.core.units import ALIGN_NBYTES, SUM_NBYTES
from kvkeep.errors import BlockError, LayoutMismatch, LeaseExpired
from kvkeep.memory.pool import Lease
from kvkeep.testing.suites.transfers import CHECKS, TransferCase
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Blocks

NB = 9  # blocks of a group; twice a chunk's blocks and the null block fit
GUARD = 4096


@dataclass
class Layer:
    """A cache and the parts of it that have the blocks first, in the order in which a page's bytes are kept."""

    cache: torch.Tensor
    parts: Sequence[torch.Tensor]


def blocks_first(*shape: int, dtype: torch.dtype = torch.float16) -> Layer:
    cache = torch.zeros(shape, dtype=dtype)
    return Layer(cache, [cache])


def k_and_v(*shape: int, dtype: torch.dtype = torch.float16) -> Layer:
    cache = torch.zeros((2, *shape), dtype=dtype)
    return Layer(cache, [cache[0], cache[1]])


def permuted(*shape: int) -> Layer:
    """Dense pages whose inner dimensions are stored in another order (heads before tokens)."""
    cache = torch.zeros(shape, dtype=torch.bfloat16).permute(0, 2, 1, 3)
    return Layer(cache, [cache])


def of_one_allocation(layers: int, *page: int) -> list[Layer]:
    """vLLM's cross-layer allocation: a block's pages of all layers are neighbours, so a layer's pages have gaps."""
    whole = torch.zeros((NB, layers, *page), dtype=torch.bfloat16)
    return [Layer(whole[:, n], [whole[:, n]]) for n in range(layers)]


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor in the order in which they lie in memory, from its own offset on, blocks by strides."""
    page = tensor[0]
    nbytes = page.numel() * tensor.element_size()
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    start, stride = tensor.storage_offset() * tensor.element_size(), tensor.stride(0) * tensor.element_size()
    return np.lib.stride_tricks.as_strided(storage[start:], (tensor.shape[0], nbytes), (stride, 1))


def case_of(groups: Sequence[Sequence[Layer]], block_tokens: Sequence[int], chunk_tokens: int, nb: int) -> TransferCase:
    caches = [
        GroupCaches({f"g{g}.l{n}": one.cache for n, one in enumerate(layers)}, nb, tokens, 0)
        for g, (layers, tokens) in enumerate(zip(groups, block_tokens, strict=True))
    ]

    def views(group: int, layer: int) -> list[np.ndarray]:
        return [raw(part) for part in groups[group][layer].parts]

    def read(group: int, layer: int) -> np.ndarray:
        return np.concatenate([one.reshape(nb, -1) for one in views(group, layer)], axis=1)

    def write(group: int, layer: int, pages: np.ndarray) -> None:
        start = 0
        for view in views(group, layer):
            nbytes = view.shape[0] * view.shape[1] // nb
            view[:] = pages[:, start : start + nbytes].reshape(view.shape)
            start += nbytes

    return TransferCase(ReferenceTransfer(caches, chunk_tokens), [nb] * len(groups), read, write)


CASES: dict[str, Callable[[], TransferCase]] = {
    "cpu packed": lambda: case_of([[blocks_first(NB, 2, 16, 128) for _ in range(3)]], [16], 64, NB),
    "flash attention": lambda: case_of([[k_and_v(NB, 16, 2, 64) for _ in range(2)]], [16], 64, NB),
    "flash attention, inner order": lambda: case_of([[permuted(NB, 2, 16, 64)]], [16], 64, NB),
    "mla": lambda: case_of([[blocks_first(NB, 16, 576, dtype=torch.bfloat16)]], [16], 64, NB),
    "one allocation": lambda: case_of([of_one_allocation(3, 2, 16, 32)], [16], 64, NB),
    "kernel blocks": lambda: case_of([[blocks_first(2 * NB, 16, 32)]], [32], 128, NB),
    "kernel blocks, k and v": lambda: case_of([[k_and_v(2 * NB, 16, 2, 8)]], [32], 128, NB),
    "fp8": lambda: case_of([[k_and_v(NB, 16, 2, 64, dtype=torch.float8_e4m3fn)]], [16], 64, NB),
    "fp32": lambda: case_of([[blocks_first(NB, 2, 16, 64, dtype=torch.float32)]], [16], 64, NB),
    "two groups": lambda: case_of(
        [[k_and_v(NB, 16, 2, 8)], [blocks_first(NB, 32, 24), blocks_first(NB, 32, 8)]], [16, 32], 64, NB
    ),
    "odd pages": lambda: case_of(
        [[blocks_first(NB, 1, 656, dtype=torch.uint8), blocks_first(NB, 1, 132, dtype=torch.uint8)]], [1], 3, NB
    ),
    "range is a whole page of memory": lambda: case_of([[blocks_first(NB, 16, 64, dtype=torch.uint8)]], [16], 64, NB),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_conforms(name: str, check: Callable[[TransferCase], None]):
    check(CASES[name]())


# ---- the same once more by hand, against torch and without the kit's own reckoning


def memory_for(transfer: ReferenceTransfer) -> tuple[np.ndarray, Lease]:
    memory = np.full(transfer.shard.nbytes + 2 * GUARD, 0xEE, np.uint8)
    return memory, Lease(memory[GUARD:-GUARD], transfer.shard)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_arrive_as_the_same_integers_nans_included(dtype: torch.dtype):
    shape = (2, NB, 4, 2, 8)
    cache = torch.arange(2 * NB * 64, dtype=torch.int32).mul(40503).to(torch.int16).view(dtype).reshape(shape)
    transfer = ReferenceTransfer([GroupCaches({"l": cache}, NB, 4, 0)], 8)
    before = integers(cache).clone()
    assert cache.isnan().any(), "no NaN to lose"
    memory, lease = memory_for(transfer)
    sums = transfer.gather([Blocks(0, 0, (7, 2))], lease, True)
    assert transfer.scatter(lease, [Blocks(0, 0, (3, 8))], sums)
    after = integers(cache)
    assert torch.equal(after[:, 3], before[:, 7])
    assert torch.equal(after[:, 8], before[:, 2])
    others = [n for n in range(NB) if n not in (3, 8)]
    assert torch.equal(after[:, others], before[:, others])
    assert (memory[:GUARD] == 0xEE).all()
    assert (memory[-GUARD:] == 0xEE).all()


def test_padding_is_zeroed_at_the_seal_and_not_before():
    cache = torch.ones((NB, 656), dtype=torch.uint8)
    transfer = ReferenceTransfer([GroupCaches({"l": cache}, NB, 1, 0)], 2)
    _, lease = memory_for(transfer)
    assert transfer.gather([Blocks(0, 0, (1,))], lease, False) == b""
    (view,) = lease.views()
    assert view.nbytes == ALIGN_NBYTES
    assert (view[656:] == 0xEE).all()
    sums = transfer.gather([Blocks(0, 1, (2,))], lease, True)
    assert (view[: 2 * 656] == 1).all()
    assert not view[2 * 656 :].any()
    assert sums == xxhash.xxh3_128_digest(view.tobytes())


@pytest.mark.parametrize("place", [0, 655, 656, 1311, 1312, 2000, 4095])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_fails_the_scatter_and_nothing_is_written(place: int, bit: int):
    cache = torch.arange(NB * 656, dtype=torch.int32).to(torch.uint8).reshape(NB, 656)
    other = torch.full((NB, 132), 5, dtype=torch.uint8)
    transfer = ReferenceTransfer([GroupCaches({"a": other, "b": cache}, NB, 1, 0)], 2)
    _, lease = memory_for(transfer)
    sums = transfer.gather([Blocks(0, 0, (1, 2))], lease, True)
    assert len(sums) == 2 * SUM_NBYTES
    lease.views()[1][place] ^= 1 << bit  # the second range: the first, intact, must not be written either
    other.fill_(6)
    before = cache.clone()
    assert not transfer.scatter(lease, [Blocks(0, 0, (3, 4))], sums)
    assert torch.equal(cache, before)
    assert (other == 6).all()


@pytest.mark.parametrize("change", ["short", "cut", "one too few", "one too many", "other order", "rest"])
def test_sums_of_another_form_never_hold(change: str):
    caches = {name: torch.full((NB, 64), n, dtype=torch.uint8) for n, name in enumerate(("a", "b"))}
    transfer = ReferenceTransfer([GroupCaches(caches, NB, 1, 0)], 2)
    _, lease = memory_for(transfer)
    sums = transfer.gather([Blocks(0, 0, (1, 2))], lease, True)
    first, second = sums[:SUM_NBYTES], sums[SUM_NBYTES:]
    wrong = {
        "short": b"short",
        "cut": sums[:-1],
        "one too few": first,
        "one too many": sums + second,
        "other order": second + first,
        "rest": sums + b"x",
    }[change]
    assert not transfer.scatter(lease, [Blocks(0, 0, (3, 4))], wrong)
    assert transfer.scatter(lease, [Blocks(0, 0, (3, 4))], sums)


@pytest.mark.parametrize(
    ("blocks", "unique", "says"),
    [
        ([Blocks(0, 0, (NB,))], False, "block 9 of group 0 does not exist"),
        ([Blocks(1, 0, (-1,))], False, "block -1 of group 1 does not exist"),
        ([Blocks(1, 0, (0,))], False, "block 0 of group 1 is the null block"),
        ([Blocks(0, 0, (1, 2)), Blocks(0, 2, (3, 1))], True, "block 1 of group 0 is named twice"),
        ([Blocks(0, 3, (1, 2))], False, "slot 5 is outside"),
        ([Blocks(1, -1, (1,))], False, "slot -1 is outside"),
    ],
)
def test_a_plan_with_wrong_blocks_is_refused(blocks: list[Blocks], unique: bool, says: str):
    transfer = CASES["two groups"]().transfer
    with pytest.raises(BlockError, match=says):
        transfer.check(blocks, unique)


def test_one_id_in_two_groups_is_no_repetition():
    CASES["two groups"]().transfer.check([Blocks(0, 0, (1, 2)), Blocks(1, 0, (1, 2))], True)


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (torch.zeros((NB, 4, 16), dtype=torch.uint8)[:, :, :8], "not one piece of memory"),
        (torch.zeros((NB, 4, 1), dtype=torch.uint8).expand(NB, 4, 8), "not one piece of memory"),
        (torch.zeros((NB + 1, 4, 8), dtype=torch.uint8), f"no dimension of {NB} blocks"),
        (torch.zeros((3, NB, 8), dtype=torch.uint8), f"no dimension of {NB} blocks"),
        (torch.zeros((2 * NB, 3, 8), dtype=torch.uint8)[:, 0], "kernel blocks of a block are not neighbours"),
    ],
)
def test_a_cache_that_cannot_be_copied_names_its_layer(cache: torch.Tensor, says: str):
    good = torch.zeros((NB, 8), dtype=torch.uint8)
    with pytest.raises(LayoutMismatch, match=f"^model.layers.7.attn: .*{says}"):
        ReferenceTransfer([GroupCaches({"model.layers.6.attn": good, "model.layers.7.attn": cache}, NB, 4, 0)], 8)


def test_a_lease_that_ended_is_not_used():
    transfer = CASES["mla"]().transfer
    _, lease = memory_for(transfer)
    lease.close()
    with pytest.raises(LeaseExpired):
        transfer.gather([Blocks(0, 0, (1,))], lease, False)
    with pytest.raises(LeaseExpired):
        transfer.scatter(lease, [Blocks(0, 0, (1,))], b"")


def test_a_gather_does_not_copy_the_cache_it_reads_from():
    blocks, page = 2000, 1024
    whole = torch.zeros((blocks, 2, page), dtype=torch.uint8)
    transfer = ReferenceTransfer([GroupCaches({"l": whole[:, 1]}, blocks, 1, 0)], 4)
    _, lease = memory_for(transfer)
    tracemalloc.start()
    try:
        transfer.gather([Blocks(0, 0, (1, 2, 3, 4))], lease, True)
        _, peak_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_nbytes < blocks * page // 4
