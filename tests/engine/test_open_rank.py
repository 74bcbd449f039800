"""Which rank's half suits which transfer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvkeep.config import Config
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.copies.device import DeviceCopies
from kvkeep.engine.rank.open import open_rank, wish_of
from kvkeep.testing.doubles.device import LOCKS, HeldDevice
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.choice import Wish
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.staged import StagedTransfer
from kvkeep.transfer.transfer import Opened
from kvkeep.wire.pool_socket import PoolDoor

GROUPS = [GroupCaches({"l": torch.zeros(4, 8)}, 4, 4, 0)]
ON_DEVICE = Opened(HeldDevice().transfer(GROUPS, 8), LOCKS, "a device")


@pytest.mark.parametrize(
    ("set_to", "whole", "mode"),
    [("auto", True, "auto"), ("layerwise", True, "layerwise"), ("layerwise", False, "bulk"), ("bulk", True, "bulk")],
)
def test_a_device_has_a_worker_that_waits_for_no_copy(set_to: str, whole: bool, mode: str) -> None:
    config = Config(transfer_mode=set_to)  # type: ignore[arg-type]
    worker = open_rank(3, ON_DEVICE, PoolDoor(), config, alone=True, whole=whole)
    assert isinstance(worker.copies, DeviceCopies)
    assert worker.copies.settlers is not None, "no copy is waited for in the engine's thread"
    assert worker.copies.mode.loads_layerwise(1 << 40) == (mode == "layerwise"), "auto: layers may run without waiting"
    assert worker.copies.mode.stores_layerwise(1 << 40) == (mode != "bulk")
    assert worker.pool._pin_calls == LOCKS
    worker.close()


@pytest.mark.parametrize("made", [ReferenceTransfer, StagedTransfer])
def test_anything_else_has_one_whose_copies_end_with_the_step(
    made: type[ReferenceTransfer | StagedTransfer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvkeep")
    opened = Opened(made(GROUPS, 8), None, "this way")
    worker = open_rank(0, opened, PoolDoor(), Config(transfer_mode="layerwise"), alone=False, whole=True)
    assert isinstance(worker.copies, CpuCopies)
    assert worker.copies._mode.layerwise() == (made is ReferenceTransfer)
    assert "copies: this way" in caplog.text
    worker.close()


def test_what_is_set_is_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wish = wish_of(Config(transfer="copy", transfer_programs=8))
    assert wish == Wish(tmp_path / "kvkeep" / "transfer.json", "copy", 8)
