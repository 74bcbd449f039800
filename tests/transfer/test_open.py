from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkeep.testing.doubles.device import InlineStream
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device import probe as probe_module
from kvkeep.transfer.device.choice import Wish
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.probe import PAGE_SIZES, probe, scattered
from kvkeep.transfer.device.tables import PageCopier, Part
from kvkeep.transfer.open import open_transfer
from kvkeep.transfer.pages import GroupCaches


class Memmove:
    def __init__(self) -> None:
        self.copied_nbytes = 0

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, nbytes)
        self.copied_nbytes += int(sizes.sum())


def test_on_a_cpu_nothing_is_measured_or_locked(tmp_path: Path):
    caches = GroupCaches({"l": torch.zeros(9, 64)}, 9, 16, 0)
    opened = open_transfer([caches], 64, Wish(tmp_path / "kept.json"))
    assert isinstance(opened.transfer, ReferenceTransfer)
    assert opened.pin_calls is None
    assert not list(tmp_path.iterdir())


def test_a_probe_copies_every_page_each_way_and_none_beside_its_neighbour(monkeypatch: pytest.MonkeyPatch):
    nbytes = 4 << 20
    monkeypatch.setattr(probe_module, "NBYTES", nbytes)
    kernel, copy = Memmove(), Memmove()

    def made(driver: Memmove, parts: tuple[Part, ...]) -> PageCopier:
        return MemcpyCopier(parts, driver, lambda: 0)

    samples = probe(
        torch.device("cpu"),
        InlineStream(),
        lambda parts: made(kernel, parts),
        lambda parts: made(copy, parts),
    )
    assert [(one.page_nbytes, one.to_pool) for one in samples] == [
        (n, way) for n in PAGE_SIZES for way in (True, False)
    ]
    assert all(one.kernel_rate > 0 and one.copy_rate > 0 for one in samples)
    assert kernel.copied_nbytes == copy.copied_nbytes == 4 * 2 * len(PAGE_SIZES) * nbytes


def test_scattered_pages_are_all_of_them_in_no_order():
    inside = torch.arange(1 << 16, dtype=torch.int32).view(torch.uint8)
    outside = torch.zeros(1 << 18, dtype=torch.uint8)
    job, parts = scattered(inside, outside, 4096)
    MemcpyCopier(parts, Memmove(), lambda: 0).start([job], True, None)
    order = list(job.blocks[0].block_ids)
    assert order != sorted(order)
    assert torch.equal(outside.view(-1, 4096), inside.view(-1, 4096)[order])
    assert sorted(order) == list(range(64))
