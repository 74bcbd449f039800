"""The bulk verbs of `CacheEngine`: every byte, every mask, nothing left behind; over a real store in a thread."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.core.key import none_hash
from kvkeep.core.units import SUM_NBYTES
from kvkeep.doors.library.digests import Prompts
from kvkeep.errors import BlockError, StoreGone
from kvkeep.testing.doubles.device import HeldDevice
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.testing.doubles.transfers import FaultyTransfer
from kvkeep.testing.fake_engine.model import FakeModel, GroupShape
from kvkeep.transfer.pages import GroupCaches
from kvkeep.wire import messages as m

from .library import CHUNK, LAYOUTS, NB, Library, flash_attention, group, library, mla

HERE = list(range(1, 37))
THERE = list(range(79, 43, -1))


@pytest.fixture(params=LAYOUTS)
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    with library(LAYOUTS[request.param]()) as made:
        made.fill(1)
        yield made


@pytest.fixture
def small() -> Iterator[Library]:
    with library([group(flash_attention, 2)]) as made:
        made.fill(1)
        yield made


@pytest.mark.parametrize("count", [0, 7, 8, 9, 33])
def test_what_was_stored_arrives_byte_for_byte_in_other_blocks(lib: Library, count: int):
    tokens = list(range(100, 100 + count))
    here, there = lib.table(HERE, count), lib.table(THERE, count)
    whole = count // CHUNK * CHUNK
    assert lib.engine.store(tokens, here) == whole
    assert lib.engine.lookup(tokens) == whole
    before = lib.pages()
    mask = lib.engine.retrieve(tokens, there)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [n < whole for n in range(count)]
    assert lib.pages() == lib.after(before, here, there, mask)
    assert lib.settled()["chunks"] == count // CHUNK
    assert lib.engine.figures.count("delivered_tokens") == whole


def test_through_a_staging_copy_too():
    with library(LAYOUTS["groups of different shape"](), staged=True) as lib:
        lib.fill(2)
        here, there = lib.table(HERE, 32), lib.table(THERE, 32)
        assert lib.engine.store(range(32), here) == 32
        before = lib.pages()
        *_, mask = lib.engine.retrieve_layer(range(32), there)
        assert mask.all()
        assert lib.pages() == lib.after(before, here, there, mask)
        lib.settled()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_a_device_of_its_own_accord_too(layout: str, kind: Callable[[list[int]], Any]):
    device = HeldDevice()
    with library(LAYOUTS[layout](), device=device) as lib:
        lib.fill(2)
        here, there = lib.table(HERE, 32), lib.table(THERE, 32)
        assert lib.engine.store(range(32), [kind(one) for one in here]) == 32
        assert device.stores.waits > 0, "staged"
        before = lib.pages()
        *_, mask = lib.engine.retrieve_layer(range(32), [kind(one) for one in there])
        assert mask.all()
        assert not device.loads.held
        assert lib.pages() == lib.after(before, here, there, mask)
        lib.settled()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 70),
    start=st.integers(0, 17).map(lambda n: 4 * n) | st.integers(0, 70),
    present=st.integers(0, 9),
    kind=st.sampled_from([list, np.array, torch.tensor]),
    layerwise=st.booleans(),
)
@example(count=35, start=8, present=3, kind=list, layerwise=True)
@example(count=35, start=8, present=3, kind=np.array, layerwise=False)
def test_any_mask_and_length(
    shared_lib: Library, count: int, start: int, present: int, kind: Callable[[list[int]], Any], layerwise: bool
):
    """The oracle: a mask is true from its first true token to the last present chunk, if that is at a block of each."""
    lib, engine = shared_lib, shared_lib.engine
    engine.clear()
    start = min(start, count)
    tokens = kind(list(range(7, 7 + count)))
    here, there = lib.table(HERE, 72), lib.table(THERE, 72)
    lib.fill(count)
    whole = min(count // CHUNK, present) * CHUNK
    assert engine.store(tokens[:whole], here) == whole
    flags = np.arange(count) >= start
    before = lib.pages()
    if layerwise:
        announced, *_, mask = engine.retrieve_layer(tokens, there, flags)
        assert announced == mask.sum()
    else:
        mask = engine.retrieve(tokens, there, flags)
    end = whole if start % 8 == 0 else start  # 8 tokens: the largest block of these groups
    assert mask.tolist() == [start <= n < end for n in range(count)]
    assert lib.pages() == lib.after(before, here, there, mask)
    first = -(-start // CHUNK) * CHUNK
    stored = engine.store(tokens, here, flags)
    assert stored == max(0, count // CHUNK * CHUNK - max(first, whole)), "stored are the whole chunks of true tokens"
    lib.settled()


@pytest.fixture(scope="module")
def shared_lib() -> Iterator[Library]:
    with library(LAYOUTS["groups of different shape"]()) as made:
        yield made


def test_a_chunk_with_a_false_token_is_not_stored_and_its_blocks_not_read(small: Library):
    mask = [False] * 9 + [True] * 15
    tables = [[0, 0, 0, 0, 5, 6]]  # what the engine did not name is the null block: it must not be touched
    assert small.engine.store(range(24), tables, mask) == 8
    assert small.engine.lookup(range(24)) == 0, "the first chunk was never stored"
    assert small.engine.retrieve(range(24), [[0, 0, 0, 0, 7, 8]], [False] * 16 + [True] * 8).sum() == 8
    small.settled()


def test_a_chunk_that_overlaps_the_engines_own_tokens_is_written_from_the_first_block_it_lacks(small: Library):
    assert small.engine.store(range(16), [[1, 2, 3, 4]]) == 16
    before = small.pages()
    mask = small.engine.retrieve(range(16), [[0, 10, 11, 12]], [False] * 4 + [True] * 12)
    assert mask.tolist() == [False] * 4 + [True] * 12
    assert small.pages() == small.after(before, [[1, 2, 3, 4]], [[0, 10, 11, 12]], mask)
    assert not small.engine.retrieve(range(16), [[9, 10, 11, 12]], [False] * 5 + [True] * 11).any(), "inside a block"
    assert small.engine.figures.misses()["unaligned"] == 1


def test_a_hole_between_present_chunks_is_filled_with_its_own_blocks(small: Library):
    """The middle chunk is the only one that is absent: it must not get its neighbour's bytes."""
    tokens, here, there = range(24), [HERE[:6]], [THERE[:6]]
    assert small.engine.store(tokens[:8], here) == 8
    assert small.engine.store(tokens, here, [False] * 16 + [True] * 8) == 8
    assert small.engine.lookup(tokens) == 8
    assert not small.engine.retrieve(tokens, there)[8:].any(), "a mask has no hole: what is behind one is not a hit"
    assert small.engine.store(tokens, here) == 8
    before = small.pages()
    mask = small.engine.retrieve(tokens, there)
    assert mask.all()
    assert small.pages() == small.after(before, here, there, mask)
    assert small.settled()["chunks"] == 3


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([True, False] + [True] * 14, "hole at token 1"),
        ([False] * 4 + [True] * 8 + [False] * 4, "hole at token 12"),
        ([True] * 15, "mask of shape"),
    ],
)
def test_a_mask_with_a_hole_or_of_another_length_is_refused(small: Library, mask: list[bool], says: str):
    for verb in (small.engine.store, small.engine.retrieve, small.engine.store_layer, small.engine.retrieve_layer):
        with pytest.raises(ValueError, match=says):
            verb(range(16), [HERE], mask)
    small.settled()


@pytest.mark.parametrize(
    "tables", [[], [HERE, HERE], [[1, 2, 3]], [[[1, 2, 3, 4]]], [[1, 2, 3.5, 4]], [[1, 2, 3, 1 << 70]]]
)
def test_tables_that_do_not_fit_are_refused(small: Library, tables: list[list[int]]):
    for verb in (small.engine.store, small.engine.retrieve, small.engine.store_layer, small.engine.retrieve_layer):
        with pytest.raises(ValueError, match="table"):
            verb(range(16), tables)


@pytest.mark.parametrize("wrong", [[1, 2, 0, 4], [1, 2, NB, 4], [1, -1, 3, 4]])
def test_a_block_that_is_none_is_refused_and_holds_nothing(small: Library, wrong: list[int]):
    engine = small.engine
    for verb in (engine.store, lambda *one: list(engine.store_layer(*one))):
        with pytest.raises(BlockError, match="block"):
            verb(range(16), [wrong])
        small.settled()
    assert engine.store(range(16), [[1, 2, 3, 4]]) == 16
    before = small.pages()
    for verb in (engine.retrieve, lambda *one: list(engine.retrieve_layer(*one))):
        for tables in ([wrong], [[1, 2, 3, 1]]):
            with pytest.raises(BlockError, match="block"):
                verb(range(16), tables)
            small.settled()
    assert small.pages() == before


def test_the_fake_engines_blocks_equal_recomputation():
    shapes = (GroupShape(4, layers=2), GroupShape(2, window=6, layers=1))
    model = FakeModel(shapes, 1, NB)
    caches = [
        {f"{number}.{n}": torch.from_numpy(one) for n, one in enumerate(model.caches[number][0].view(np.int64))}
        for number in range(2)
    ]
    groups = [GroupCaches(one, NB, shape.block_tokens, shape.window) for one, shape in zip(caches, shapes, strict=True)]
    tokens = [5, 3, 1, 2] * 6
    with library(groups) as lib:
        here, there = lib.table(HERE, 24), lib.table(THERE, 24)
        model.forward(tokens, (0, 24), here)
        assert lib.engine.store(tokens, here) == 24
        for cache in model.caches:
            cache[:] = 0
        assert lib.engine.retrieve([*tokens, 1], [[*one, 1] for one in there]).sum() == 24
        for number, shape in enumerate(shapes):
            held = model.caches[number][..., there[number], :].reshape(1, shape.layers, 2, 24)
            assert (held == model.expected(number, tuple(tokens))).all()


def test_another_identity_salt_or_token_is_a_miss(small: Library):
    tokens = np.arange(16, dtype=np.uint32)
    assert small.engine.store(tokens, [HERE], extra=("tenant", "a")) == 16
    assert small.engine.lookup(tokens, extra=("tenant", "a")) == 16
    assert small.engine.lookup(tokens) == 0
    assert small.engine.lookup(tokens, extra=("tenant", "b")) == 0
    tokens[9] += 1  # the caller's own array: what is remembered of it must not change with it
    assert small.engine.lookup(tokens, extra=("tenant", "a")) == 8
    tokens[0] += 1
    assert small.engine.lookup(tokens, extra=("tenant", "a")) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=20))
def test_remembered_digests_are_those_of_a_fresh_chain(prompts: list[list[int]]):
    remembering = Prompts(4, none_hash())
    for number, tokens in enumerate(prompts):
        extra = ("salt",) if number % 3 == 2 else None
        assert remembering.digests(tokens, extra) == Prompts(4, none_hash()).digests(tokens, extra)


@pytest.mark.parametrize(("stored", "asked"), [((1,), (True,)), ((0,), (False,)), (("a", 1), ("a", True))])
def test_remembered_or_not_what_differs_in_a_digest_is_another_prompt(stored: Any, asked: Any):
    remembering = Prompts(4, none_hash())
    remembering.digests([1, 2, 3, 4], stored)
    assert remembering.digests([1, 2, 3, 4], asked) == Prompts(4, none_hash()).digests([1, 2, 3, 4], asked)


# ---- pins and eviction -------------------------------------------------------------------------------------------


def other(small: Library, number: int, chunks: int) -> int:
    return small.engine.store([1000 + number] * (chunks * CHUNK), [list(range(1, 33))])


def test_what_is_pinned_outlives_eviction_until_it_is_unpinned(small: Library):
    tokens = range(32)
    small.engine.store(tokens, [HERE])
    assert small.engine.lookup(tokens, "request 1") == 32
    assert small.engine.lookup(tokens, "request 1") == 32, "an id pins one prompt; pinning again replaces"
    assert small.engine.store_figures()["pinned_nbytes"] > 0
    for number in range(4):
        assert other(small, number, 4) == 32
    before = small.pages()
    assert small.engine.retrieve(tokens, [THERE]).all()
    assert small.pages() == small.after(before, [HERE[:8]], [THERE[:8]], np.ones(32, bool))
    assert small.engine.retrieve(tokens[:8], [THERE]).all(), "a part of what is pinned"
    small.engine.unpin("request 1")
    small.engine.unpin("request 1")
    small.settled()
    for number in range(5, 9):
        other(small, number, 4)
    assert small.engine.lookup(tokens) == 0, "unpinned, it can be evicted"


def test_eviction_between_lookup_and_retrieve_is_a_miss_for_what_has_gone(small: Library):
    tokens = range(32)
    small.engine.store(tokens, [HERE])
    assert small.engine.lookup(tokens) == 32
    for number in range(3):
        other(small, number, 4)
    assert other(small, 3, 2) == 16
    before = small.pages()
    mask = small.engine.retrieve(tokens, [THERE])
    assert mask.tolist() == [n < 16 for n in range(32)], "the tail goes first"
    assert small.pages() == small.after(before, [HERE[:8]], [THERE[:8]], mask)
    assert small.engine.figures.misses()["partly_stored"] == 1
    small.settled()


def test_sums_of_many_chunks_go_in_several_messages(monkeypatch: pytest.MonkeyPatch):
    with library([group(flash_attention, 2)], verify_pool="always") as lib:
        lib.fill(1)
        monkeypatch.setattr(m, "COMMIT_NBYTES", 2 * SUM_NBYTES * lib.engine.layers + 1)
        assert lib.engine.store(range(7 * CHUNK), [HERE]) == 7 * CHUNK
        before = lib.pages()
        mask = lib.engine.retrieve(range(7 * CHUNK), [THERE])
        assert mask.all()
        assert lib.pages() == lib.after(before, [HERE[:14]], [THERE[:14]], mask)
        lib.settled()


def test_a_full_pool_keeps_the_beginning(small: Library):
    assert small.engine.store(range(20 * CHUNK), [[1] * 40]) == 16 * CHUNK
    assert small.engine.figures.count("skipped_full_chunks") == 4
    assert small.engine.lookup(range(20 * CHUNK)) == 16 * CHUNK
    small.settled()


# ---- control -----------------------------------------------------------------------------------------------------


def test_frozen_serves_and_stores_nothing_bypassed_does_neither(small: Library):
    engine = small.engine
    engine.store(range(16), [HERE])
    engine.freeze(True)
    assert engine.store(range(100, 100 + 16 * CHUNK), [HERE]) == 0, "and nothing is evicted for it"
    assert (engine.lookup(range(16)), int(engine.retrieve(range(16), [THERE]).sum())) == (16, 16)
    engine.freeze(False)
    engine.bypass(True)
    assert engine.store(range(100, 116), [HERE]) == 0
    assert (engine.lookup(range(16), "pin"), int(engine.retrieve(range(16), [THERE]).sum())) == (0, 0)
    engine.bypass(False)
    assert engine.store(range(100, 116), [HERE]) == 16
    assert engine.lookup(range(16)) == 16
    assert small.settled()["chunks"] == 4


def test_clear_drops_everything_pins_too(small: Library):
    small.engine.store(range(32), [HERE])
    assert small.engine.lookup(range(32), "pin") == 32
    assert small.engine.clear() == 4
    assert small.engine.lookup(range(32)) == 0
    assert not small.engine.retrieve(range(32), [THERE]).any()
    figures = small.settled()
    assert (figures["chunks"], figures["used_nbytes"]) == (0, 0)


def test_closed_everything_is_a_miss_and_clear_says_so():
    with library([group(mla, 1)]) as lib:
        lib.engine.store(range(16), [HERE])
        lib.engine.close()
        lib.engine.close()
        assert (lib.engine.lookup(range(16)), lib.engine.store(range(16), [HERE])) == (0, 0)
        assert not lib.engine.retrieve(range(16), [THERE]).any()
        assert lib.engine.figures.misses()["store_gone"] == 1
        with pytest.raises(StoreGone):
            lib.engine.clear()
        assert isinstance(lib.source, ThreadSource)
        assert len(lib.source.boots) == 1, "no verb starts a store again"


def test_a_changed_chunk_is_dropped_and_what_precedes_it_delivered():
    with library([group(flash_attention, 3)], verify_pool="always") as lib:
        assert isinstance(lib.source, ThreadSource)
        lib.fill(1)
        lib.engine.store(range(32), [HERE])
        chunk_nbytes = lib.settled()["used_nbytes"] // 4
        offsets = [entry.offset for entry in lib.source.running.store.index._entries.values()]
        lib.source.running.region.array[offsets[2] + chunk_nbytes - 1] ^= 4  # in the padding of its last layer
        before = lib.pages()
        mask = lib.engine.retrieve(range(32), [THERE])
        assert mask.tolist() == [n < 16 for n in range(32)]
        assert lib.pages() == lib.after(before, [HERE[:8]], [THERE[:8]], mask)
        assert lib.engine.figures.count("failed_tokens") == 16
        assert lib.engine.lookup(range(32)) == 16, "it is not given out again"
        assert lib.engine.store(range(32), [HERE]) == 8
        assert lib.engine.retrieve(range(32), [THERE]).all()
        lib.settled()


def test_a_copy_that_fails_ends_the_mask():
    with library([group(mla, 2)], wrap=lambda one: FaultyTransfer(one, {1})) as lib:
        lib.engine.store(range(32), [HERE])
        assert lib.engine.retrieve(range(32), [THERE]).tolist() == [n < 8 for n in range(32)]
        lib.settled()


def test_nothing_of_the_process_changes():
    def state() -> object:
        root = logging.getLogger()
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
        loggers = logging.getLogger("kvkeep")
        return handlers, dict(os.environ), root.level, list(root.handlers), loggers.level, list(loggers.handlers)

    before, threads = state(), threading.active_count()
    with library([group(mla, 1)]) as lib:
        lib.engine.store(range(16), [HERE])
        assert state() == before
    assert state() == before
    assert threading.active_count() <= threads, "a thread is left"
