"""The layerwise verbs of `CacheEngine`: how often they yield in every state, what is true after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.copies.thread import ThreadCopier
from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.testing.doubles.transfers import FaultyTransfer
from kvkeep.transfer.transfer import Blocks, Transfer

from .library import CHUNK, LAYOUTS, Library, cpu_packed, flash_attention, group, library, mla

HERE = list(range(1, 37))
THERE = list(range(79, 43, -1))
TOKENS = range(32)
LAYERS = 5


WAYS = ["bulk", "layerwise", "layerwise on a thread"]


@pytest.fixture(params=WAYS)
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    mode, thread = request.param.split()[0], "thread" in request.param
    copier = ThreadCopier() if thread else None
    with library(LAYOUTS["groups of different shape"](), transfer_mode=mode, copier=copier) as made:
        made.fill(1)
        assert made.engine.layers == LAYERS
        yield made


@dataclass
class State:
    """What is done to an engine before a generator's first step and after its third; what the mask must say then."""

    name: str
    arrives: int
    stores: int
    before: Callable[[Library], object] = lambda lib: lib.engine.store(TOKENS, lib.table(HERE, 32))
    between: Callable[[Library], object] = lambda lib: None
    tokens: range = TOKENS
    mask: list[bool] | None = None


def gone(lib: Library) -> None:
    """The store's end of the socket closes, and its answers are over."""
    assert isinstance(lib.source, ThreadSource)
    lib.source.running.server.stop()
    lib.source.running.thread.join(10)


def present_then(act: Callable[[Library], object]) -> Callable[[Library], object]:
    return lambda lib: (lib.engine.store(TOKENS, lib.table(HERE, 32)), act(lib))


STATES = [
    State("healthy", 32, 0),
    State("miss", 0, 32, before=lambda lib: None),
    State("frozen", 32, 0, before=present_then(lambda lib: lib.engine.freeze(True))),
    State("frozen and a miss", 0, 0, before=lambda lib: lib.engine.freeze(True)),
    State("bypassed", 0, 0, before=present_then(lambda lib: lib.engine.bypass(True))),
    State("partly present", 8, 24, before=lambda lib: lib.engine.store(TOKENS[:8], lib.table(HERE, 8))),
    State("present with a hole", 0, 24, before=lambda lib: lib.engine.store(TOKENS[:16], lib.table(HERE, 16), [False] * 8 + [True] * 8)),
    State("store lost before", 0, 0, before=present_then(gone)),
    State("closed before", 0, 0, before=present_then(lambda lib: lib.engine.close())),
    State("frozen half-way", 0, 0, before=lambda lib: None, between=lambda lib: lib.engine.freeze(True)),
    State("bypassed half-way", 32, 0, between=lambda lib: lib.engine.bypass(True)),
    State("cleared half-way, reading", 32, 0, between=lambda lib: lib.engine.clear()),
    State("cleared half-way, writing", 0, 0, before=lambda lib: None, between=lambda lib: lib.engine.clear()),
    State("store lost half-way, reading", 32, 0, between=gone),
    State("store lost half-way, writing", 0, 0, before=lambda lib: None, between=gone),
    State("closed half-way, reading", 32, 0, between=lambda lib: lib.engine.close()),
    State("closed half-way, writing", 0, 0, before=lambda lib: None, between=lambda lib: lib.engine.close()),
    State("no tokens", 0, 0, tokens=range(0)),
    State("less than a chunk", 0, 0, tokens=range(7)),
    State("nothing asked for", 0, 0, mask=[False] * 32),
    State("inside a block", 0, 0, mask=[False] * 3 + [True] * 29),
]  # fmt: skip


def stepped(lib: Library, generator: Iterator[object], state: State) -> list[object]:
    """All that a generator yields, with what happens after its third step."""
    got = [next(generator) for _ in range(3)]
    state.between(lib)
    return [*got, *generator]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_retrieve_layer_yields_layers_and_two_times_whatever_happens(lib: Library, state: State):
    state.before(lib)
    before = lib.pages()
    here, there = lib.table(HERE, 32), lib.table(THERE, 32)
    first, *steps, mask = stepped(lib, lib.engine.retrieve_layer(state.tokens, there, state.mask), state)
    assert len(steps) == LAYERS
    assert set(steps) == {None}
    assert isinstance(mask, np.ndarray)
    assert mask.tolist() == [n < state.arrives for n in range(len(state.tokens))]
    assert first == state.arrives, "what was announced"
    assert lib.pages() == lib.after(before, here, there, mask)
    if "lost" not in state.name and "closed" not in state.name:
        lib.settled()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_store_layer_yields_layers_and_one_times_whatever_happens(lib: Library, state: State):
    state.before(lib)
    stored = lib.engine.figures.count("stored_tokens")
    steps = stepped(lib, lib.engine.store_layer(state.tokens, lib.table(HERE, 32), state.mask), state)
    assert steps == [None] * (LAYERS + 1)
    assert lib.engine.figures.count("stored_tokens") - stored == state.stores
    if "lost" not in state.name and "closed" not in state.name:
        lib.settled()
        lib.engine.freeze(False)
        lib.engine.bypass(False)
        if state.stores:
            assert lib.engine.lookup(TOKENS) == 32
            before, there = lib.pages(), lib.table(THERE, 32)
            mask = lib.engine.retrieve(TOKENS, there)
            assert mask.all()
            assert lib.pages() == lib.after(before, lib.table(HERE, 32), there, mask), "a hole got its own blocks"


@pytest.mark.parametrize("steps", range(8))
def test_closed_early_a_generator_gives_everything_back(lib: Library, steps: int):
    storing = lib.engine.store_layer(TOKENS, lib.table(HERE, 32))
    for _ in range(min(steps, LAYERS)):
        next(storing)
    assert lib.engine.lookup(TOKENS) == 0, "nothing is readable before the last step"
    storing.close()
    assert lib.settled()["chunks"] == 0
    lib.engine.store(TOKENS, lib.table(HERE, 32))
    retrieving = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32))
    for _ in range(min(steps, LAYERS + 2)):
        next(retrieving)
    assert bool(lib.engine.store_figures()["pinned_nbytes"]) == (0 < steps < LAYERS + 2)
    retrieving.close()
    lib.settled()


def test_a_generator_that_is_dropped_while_another_call_has_its_turn_is_given_back_by_that_call(lib: Library):
    lib.engine.store(TOKENS, lib.table(HERE, 32))
    retrieving = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32))
    next(retrieving)
    with lib.engine._store._client():  # as a garbage collection amid a verb of this very thread
        retrieving.close()
    lib.settled()


@pytest.mark.parametrize("lib", ["layerwise"], indirect=True)
def test_each_step_of_a_store_reads_its_own_layer_only(lib: Library):
    """The engine fills a layer only just before its step: what is gathered earlier would be the old bytes."""
    caches = list(lib.caches())
    for cache in caches:
        cache.zero_()
    storing = lib.engine.store_layer(TOKENS, lib.table(HERE, 32))
    for number, cache in enumerate(caches):
        cache.copy_(torch.full(cache.shape, number + 1.0))
        next(storing)
        cache.zero_()
    next(storing)
    assert next(storing, "over") == "over"
    assert lib.engine.retrieve(TOKENS, lib.table(THERE, 32)).all()
    at = 0
    for number, one in enumerate(lib.groups):
        for cache in one.caches.values():
            apart = cache.shape[0] == 2
            for block in lib.table(THERE, 32)[number]:
                assert ((cache[:, block] if apart else cache[block]) == at + 1).all(), f"layer {at}, block {block}"
            at += 1


@pytest.mark.parametrize("lib", ["layerwise"], indirect=True)
def test_a_layer_is_there_after_its_step_and_no_other_one(lib: Library):
    here, there = lib.table(HERE, 32), lib.table(THERE, 32)
    lib.engine.store(TOKENS, here)
    before = lib.pages()
    full = lib.after(before, here, there, np.ones(32, bool))
    retrieving = lib.engine.retrieve_layer(TOKENS, there)
    assert next(retrieving) == 32
    for layer in range(LAYERS):
        assert next(retrieving) is None
        assert lib.pages() == [*full[: layer + 1], *before[layer + 1 :]]
    assert next(retrieving).all()
    assert next(retrieving, "over") == "over"


@dataclass
class Watched:
    """`inner`, and which layers it was asked for."""

    inner: Transfer
    layers: list[int] = field(default_factory=list)

    @property
    def shard(self) -> ShardLayout:
        return self.inner.shard

    def gather(self, blocks: list[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        self.layers += layers or []
        return self.inner.gather(blocks, lease, seal, layers)

    def scatter(self, lease: Lease, blocks: list[Blocks], sums: bytes, layers: range | None = None) -> bool:
        self.layers += layers or []
        return self.inner.scatter(lease, blocks, sums, layers)

    def check(self, blocks: list[Blocks], unique: bool) -> None:
        self.inner.check(blocks, unique)


def test_layers_go_in_the_order_of_the_forward_pass():
    """A hybrid model computes the layers of its groups in turn; the chunk keeps its own order, sums included."""
    order = ["a0", "b0", "a1", "b1", "a2"]
    groups = [group(flash_attention, 3, 4, "a"), group(mla, 2, 4, "b")]
    watched: list[Watched] = []

    def wrap(one: Transfer) -> Transfer:
        watched.append(Watched(one))
        return watched[-1]

    with library(groups, wrap=wrap, layers=order, verify_pool="always", transfer_mode="layerwise") as lib:
        lib.fill(3)
        before = lib.pages()
        assert list(lib.engine.store_layer(range(8), lib.table(HERE, 8))) == [None] * 6
        *_, mask = lib.engine.retrieve_layer(range(8), lib.table(THERE, 8))
        assert mask.all()
        assert watched[0].layers == [0, 3, 1, 4, 2] * 2
        assert lib.pages() == lib.after(before, lib.table(HERE, 8), lib.table(THERE, 8), mask)
        lib.settled()


@pytest.mark.parametrize("names", [["l0"], ["l0", "l0"], ["l0", "l1", "l2"], ["l0", "x"]])
def test_an_order_that_does_not_name_every_layer_once_is_refused(names: list[str]):
    with pytest.raises(ValueError, match="every layer is named once"), library([group(mla, 2)], layers=names):
        pass


@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_layer_ends_the_mask_and_is_dropped(layer: int, mode: str):
    with library([group(cpu_packed, 3)], verify_pool="always", transfer_mode=mode) as lib:
        assert isinstance(lib.source, ThreadSource)
        lib.fill(1)
        lib.engine.store(TOKENS, [HERE])
        size = lib.settled()["used_nbytes"] // 4
        offsets = [entry.offset for entry in lib.source.running.store.index._entries.values()]
        lib.source.running.region.array[offsets[1] + layer * size // 3] ^= 1
        *_, mask = lib.engine.retrieve_layer(TOKENS, [THERE])
        assert mask.tolist() == [n < CHUNK for n in range(32)], "what did not arrive in every layer did not arrive"
        assert lib.engine.lookup(TOKENS) == CHUNK
        lib.settled()


def test_a_copy_that_fails_in_one_layer_ends_the_mask_and_later_layers_leave_that_chunk_alone():
    def wrap(one: Transfer) -> Transfer:
        return FaultyTransfer(one, {5})  # the second chunk's second layer

    with library([group(mla, 3)], wrap=wrap, transfer_mode="layerwise") as lib:
        lib.fill(1)
        lib.engine.store(TOKENS, [HERE])
        before = lib.pages()
        *_, mask = lib.engine.retrieve_layer(TOKENS, [THERE])
        assert mask.tolist() == [n < CHUNK for n in range(32)]
        whole = lib.after(before, [HERE[:8]], [THERE[:8]], np.ones(32, bool))
        after = lib.pages()
        assert after[0] == whole[0]
        assert after[2] == lib.after(before, [HERE[:8]], [THERE[:8]], mask)[2]
        lib.settled()


def test_what_is_being_stored_layer_by_layer_is_nobodys_hit(lib: Library):
    """A chunk of which some layers are there is not partly present: it is absent, and nobody writes it twice."""
    storing = lib.engine.store_layer(TOKENS[:16], lib.table(HERE, 16))
    for _ in range(LAYERS):
        next(storing)
    assert lib.engine.lookup(TOKENS) == 0
    assert not lib.engine.retrieve(TOKENS, lib.table(THERE, 32)).any()
    assert lib.engine.store(TOKENS, lib.table(HERE, 32)) == 16, "only what nobody is writing"
    next(storing)
    assert lib.engine.lookup(TOKENS) == 32
    storing.close()
    assert lib.settled()["chunks"] == 4
