"""When `CacheEngine` copies the layers that its caller steps through: at once, ahead on a thread, or as was measured."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from kvkeep.config import Config
from kvkeep.core.layout import ShardLayout
from kvkeep.doors.library.open import open_cache
from kvkeep.engine.copies.thread import InlineCopier
from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.transfers import HeldCopier, ManualClock
from kvkeep.transfer.transfer import Blocks, Transfer

from .library import MODEL, Library, flash_attention, group, library

HERE, THERE = [list(range(1, 9))], [list(range(79, 71, -1))]
TOKENS, LAYERS = range(32), 3


def arrived(lib: Library, before: list[list[bytes]]) -> list[int]:
    """The layers that have come from HERE to THERE, whole."""
    full = lib.after(before, HERE, THERE, np.ones(32, bool))
    return [layer for layer, pages in enumerate(lib.pages()) if pages == full[layer]]


def test_in_bulk_all_layers_come_at_the_first_step_and_leave_at_the_last():
    with library([group(flash_attention, LAYERS)], transfer_mode="bulk") as lib:
        storing = lib.engine.store_layer(TOKENS, HERE)
        for _ in range(LAYERS):
            next(storing)
        lib.fill(1)  # none of it had been read before
        next(storing)
        before = lib.pages()
        retrieving = lib.engine.retrieve_layer(TOKENS, THERE)
        assert (next(retrieving), arrived(lib, before)) == (32, [])
        assert (next(retrieving), arrived(lib, before)) == (None, [0, 1, 2])
        assert list(retrieving)[-1].all()
        lib.settled()


def test_on_a_thread_loads_run_ahead_and_each_step_waits_for_its_own_layer():
    copier = HeldCopier()
    with library([group(flash_attention, LAYERS)], transfer_mode="layerwise", copier=copier) as lib:
        lib.fill(1)
        lib.engine.store(TOKENS, HERE)
        before = lib.pages()
        retrieving = lib.engine.retrieve_layer(TOKENS, THERE)
        assert (next(retrieving), arrived(lib, before)) == (32, [])
        for layer in range(LAYERS):
            next(retrieving)
            assert arrived(lib, before) == list(range(layer + 1))
            assert len(copier.waiting[False]) == LAYERS - layer - 1, "the others are on their way"
        assert next(retrieving).all()
        assert next(retrieving, "over") == "over"
        lib.settled()


def test_on_a_thread_a_store_waits_for_no_layer_before_its_last_step():
    copier = HeldCopier()
    with library([group(flash_attention, LAYERS)], transfer_mode="layerwise", copier=copier) as lib:
        storing = lib.engine.store_layer(TOKENS, HERE)
        for layer in range(LAYERS):
            next(storing)
            assert len(copier.waiting[False]) == layer + 1
        lib.fill(1)
        next(storing)
        before = lib.pages()
        assert lib.engine.retrieve(TOKENS, THERE).all()
        assert arrived(lib, before) == [0, 1, 2]
        lib.settled()


@pytest.mark.parametrize("verb", ["store_layer", "retrieve_layer"])
def test_closed_early_what_is_under_way_ends_before_its_memory_is_given_back(verb: str):
    copier = HeldCopier()
    with library([group(flash_attention, LAYERS)], transfer_mode="layerwise", copier=copier) as lib:
        if verb == "retrieve_layer":
            lib.engine.store(TOKENS, HERE)
        steps = getattr(lib.engine, verb)(TOKENS, HERE if verb == "store_layer" else THERE)
        next(steps)
        next(steps)
        assert copier.waiting[False]
        steps.close()
        assert not copier.waiting[False]
        lib.settled()


@dataclass
class Dead(InlineCopier):
    """A thread that has died."""

    def submit(self, call, background=False):
        return super().submit(lambda: None)


@pytest.mark.parametrize("stored", [True, False])
def test_with_a_thread_that_died_nothing_arrives_and_nothing_is_kept(stored: bool):
    with library([group(flash_attention, LAYERS)], transfer_mode="layerwise", copier=Dead()) as lib:
        if stored:
            lib.engine.store(TOKENS, HERE)
            *_, mask = lib.engine.retrieve_layer(TOKENS, THERE)
            assert not mask.any()
            assert lib.engine.lookup(TOKENS) == 32, "what was kept is as good as ever"
        else:
            assert list(lib.engine.store_layer(TOKENS, HERE)) == [None] * (LAYERS + 1)
            assert lib.engine.lookup(TOKENS) == 0
        lib.settled()


@dataclass
class Slow:
    """`inner`, on a clock: a copy of a whole chunk takes `whole_s`, one of a layer `layer_s`."""

    inner: Transfer
    clock: ManualClock
    whole_s: float
    layer_s: float

    @property
    def shard(self) -> ShardLayout:
        return self.inner.shard

    def gather(self, blocks: list[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        self.clock.advance(self.whole_s if layers is None else self.layer_s)
        return self.inner.gather(blocks, lease, seal, layers)

    def scatter(self, lease: Lease, blocks: list[Blocks], sums: bytes, layers: range | None = None) -> bool:
        self.clock.advance(self.whole_s if layers is None else self.layer_s)
        return self.inner.scatter(lease, blocks, sums, layers)

    def check(self, blocks: list[Blocks], unique: bool) -> None:
        self.inner.check(blocks, unique)


@pytest.mark.parametrize(("layer_s", "taken"), [(0.25, "layerwise"), (0.5, "bulk")])
def test_auto_takes_what_has_cost_the_caller_less_and_says_so(
    layer_s: float, taken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kvkeep.engine.copies.mode.LEAST_NBYTES", 1)
    caplog.set_level("INFO", "kvkeep")
    clock = ManualClock()
    groups = [group(flash_attention, LAYERS)]
    with library(
        groups,
        wrap=lambda one: Slow(one, clock, 1.0, layer_s),
        transfer_mode="auto",
        copier=InlineCopier(),
        clock=clock,
    ) as lib:
        for turn in range(4):
            list(lib.engine.store_layer(range(100 * turn, 100 * turn + 32), HERE))
            assert "transfer_mode auto" not in caplog.text
            list(lib.engine.retrieve_layer(range(100 * turn, 100 * turn + 32), THERE))
        assert f"transfer_mode auto: {taken}" in caplog.text
        began_s = clock()
        list(lib.engine.retrieve_layer(range(32), THERE))
        assert clock() - began_s == 4 * (1.0 if taken == "bulk" else LAYERS * layer_s)


@pytest.mark.process
def test_the_thread_ends_with_its_engine_and_with_a_start_that_fails():
    def copiers() -> list[threading.Thread]:
        found = [one for one in threading.enumerate() if one.name == "kvkeep-copier"]
        for one in found:
            one.join(5.0)
        return [one for one in found if one.is_alive()]

    config = Config(pool_size="16 MiB", chunk_tokens=8, transfer_mode="layerwise")
    with pytest.raises(ValueError, match="every layer is named once"):
        open_cache([group(flash_attention, LAYERS)], MODEL, config, layers=["x"])
    assert not copiers()
    with open_cache([group(flash_attention, LAYERS)], MODEL, config) as engine:
        assert list(engine.store_layer(TOKENS, HERE)) == [None] * (LAYERS + 1)
        *_, mask = engine.retrieve_layer(TOKENS, THERE)
        assert mask.all()
    assert not copiers()


@pytest.mark.process
def test_a_chunk_that_is_larger_than_was_asked_for_is_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "kvkeep")
    for asked in (18, 20):
        with open_cache([group(flash_attention, 2)], MODEL, Config(pool_size="1 MiB", chunk_tokens=asked)):
            pass
    said = [record.getMessage() for record in caplog.records if "chunk_tokens" in record.getMessage()]
    assert said == ["kvkeep: chunks of 20 tokens, whole blocks of [4] (chunk_tokens = 18)"]


def test_auto_is_bulk_where_nothing_can_copy_beside_the_caller(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "kvkeep")
    with library([group(flash_attention, LAYERS)], transfer_mode="auto"):
        assert "transfer_mode auto: bulk, since no core is free" in caplog.text
