"""A text that was kept once is retrieved at another position: K turns, nothing else changes, whoever copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from kvkeep.config import Config
from kvkeep.core.segment import segments
from kvkeep.doors.library.cache_engine import CacheEngine
from kvkeep.doors.library.open import open_cache
from kvkeep.engine.copies.copies import ChunkRotation, Copy
from kvkeep.engine.copies.device import DeviceCopies
from kvkeep.engine.copies.mode import SizeMode
from kvkeep.engine.copies.thread import ThreadCopier
from kvkeep.errors import LayoutMismatch
from kvkeep.memory.pool import Lease
from kvkeep.testing.doubles.device import HeldDevice
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.keys import Keys, Rotator
from kvkeep.transfer.rope.rotate import Pairing, key_pages, rotate, rotation_between
from kvkeep.transfer.rope.scatter import RotatingScatter, scatter_rotated
from kvkeep.transfer.transfer import Blocks

from .library import CHUNK, MODEL, NB, Library, library

FAST, SLOW = (frequencies({"rope_theta": theta}, 8, Span(4096)) for theta in (100.0, 10_000.0))
TOKENS, AT = range(32), 1001
HERE, THERE = list(range(1, 17)), list(range(79, 63, -1))
KERNEL = partial(RotatingScatter, kernel=InterpretedFunction(scatter_rotated.fn))


class Kind(NamedTuple):
    """Groups of layers, and of those that carry a position how K does."""

    groups: list[GroupCaches]
    keys: dict[str, Keys]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def of_one_group(axes: str, dtype: torch.dtype, keys: Mapping[str, Keys]) -> Kind:
    sizes = {"2": 2, "b": NB, "t": 4, "h": 2, "d": 12}
    caches = {f"l{n}": random(*(sizes[axis] for axis in axes), dtype=dtype) + n for n in range(3)}
    return Kind([GroupCaches(caches, NB, 4, 0)], dict(keys))


def k_and_v_apart() -> Kind:
    kind = of_one_group("bthd", torch.float32, {"l0": Keys("bthd", SLOW), "l2": Keys("bthd", SLOW)})
    assert len(kind.groups[0].caches) == 3, "l1 is V: it has no keys"
    return kind


def of_two_groups() -> Kind:
    full = {f"f{n}": random(2, NB, 4, 2, 8) for n in range(2)}
    near = {f"n{n}": random(NB, 2, 3, 8, 16, dtype=torch.float16) for n in range(2)}
    keys = {name: Keys("2bthd", SLOW) for name in full} | {name: Keys("b2htd", FAST) for name in near}
    return Kind([GroupCaches(full, NB, 4, 0), GroupCaches(near, NB, 8, 16)], keys)


def like(axes: str, dtype: torch.dtype, *paces: torch.Tensor, pairing: Pairing | None = None) -> Kind:
    keys = [Keys(axes, pace, pairing or Pairing()) for pace in (*paces, SLOW, SLOW, SLOW)[:3]]
    return of_one_group(axes, dtype, {f"l{n}": one for n, one in enumerate(keys)})


KINDS = {
    "flash attention": partial(like, "2bthd", torch.float16),
    "flash infer": partial(like, "b2thd", torch.float32, pairing=Pairing(interleaved=True)),
    "heads first": partial(like, "b2htd", torch.float16, pairing=Pairing(start=4)),
    "each layer its own pace": partial(like, "2bthd", torch.float32, SLOW, FAST),
    "K and V apart": k_and_v_apart,
    "two groups": of_two_groups,
    "no position at all": lambda: Kind(of_one_group("2bthd", torch.float16, {}).groups, {}),
}
WAYS = (
    "layerwise",
    "bulk",
    "thread",
    "staged",
    pytest.param("device", marks=pytest.mark.long),  # Triton's interpreter
    pytest.param("device, by layer", marks=pytest.mark.long),
    "device, no kernel",
    "device, not locked",
)


def opened(kind: Kind, way: str, device: HeldDevice, **more: object) -> AbstractContextManager[Library]:
    device.make_rotating = None if way == "device, no kernel" else KERNEL
    settings: dict[str, object] = {
        "transfer_mode": "bulk" if way in ("bulk", "device") else "layerwise",
        "copier": ThreadCopier() if way == "thread" else None,
        "staged": way == "staged",
        "device": device if way.startswith("device") else None,
    }
    return library(kind.groups, keys=kind.keys, locked=way != "device, not locked", **settings, **more)


def moved(kind: Kind, start: int, at: int) -> list[torch.Tensor]:
    """The caches once the tokens from `start` on stand at `at`: by plain copies, and torch's own turn of K."""
    made = []
    for group in kind.groups:
        for name, cache in group.caches.items():
            out, first = cache.clone(), start // group.block_tokens
            count = len(TOKENS) // group.block_tokens
            here, there = HERE[first:count], THERE[first:count]
            blocks = (slice(None), there) if cache.shape[0] == 2 else (there,)
            out[blocks] = cache[(slice(None), here) if cache.shape[0] == 2 else (here,)]
            if name in kind.keys and at:
                keys = kind.keys[name]
                pages, old = key_pages(name, out, keys.axes), torch.arange(start, len(TOKENS))
                rotation = rotation_between((old, keys.frequencies), (old + at, keys.frequencies))
                pages[there] = rotate(pages[there].flatten(0, 1), rotation, keys.pairing).view_as(pages[there])
            made.append(out)
    return made


def bits(caches: Sequence[torch.Tensor]) -> list[bytes]:
    return [one.contiguous().view(torch.uint8).numpy().tobytes() for one in caches]


@pytest.mark.parametrize("verb", ["retrieve", "retrieve_layer"])
@pytest.mark.parametrize("start", [0, 12, 24])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_k_stands_where_it_was_asked_for_and_nothing_else_has_changed(way: str, name: str, start: int, verb: str):
    kind, device = KINDS[name](), HeldDevice()
    start += start % max(group.block_tokens for group in kind.groups)  # a retrieve begins with a block of every group
    with opened(kind, way, device) as lib:
        here, there = lib.table(HERE, 32), lib.table(THERE, 32)
        assert lib.engine.store(TOKENS, here) == 32
        mask = np.arange(32) >= start
        for at in (0, AT):
            for cache in lib.caches():
                cache[(slice(None), THERE) if cache.shape[0] == 2 else (THERE,)] = 0
            wanted = moved(kind, start, at)
            if verb == "retrieve":
                arrived = lib.engine.retrieve(TOKENS, there, mask, at=at)
            else:
                coming, *steps, arrived = lib.engine.retrieve_layer(TOKENS, there, mask, at=at)
                assert (coming, steps) == (32 - start, [None] * lib.engine.layers)
            assert arrived.tolist() == mask.tolist()
            assert bits(list(lib.caches())) == bits(wanted), at
        assert not device.loads.held
        lib.settled()


@pytest.mark.long
@pytest.mark.parametrize("make_rotating", [None, KERNEL], ids=["in place", "on the way"])
def test_a_layer_stands_there_before_what_is_launched_after_its_step(make_rotating: partial[RotatingScatter] | None):
    kind, device = KINDS["flash attention"](), HeldDevice(make_rotating=make_rotating)
    with library(kind.groups, keys=kind.keys, device=device, transfer_mode="layerwise") as lib:
        lib.engine.store(TOKENS, lib.table(HERE, 32))
        before, after = bits(list(lib.caches())), bits(moved(kind, 0, AT))
        steps = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32), at=AT)
        next(steps)
        for layer in range(3):
            next(steps)
            seen = bits(list(lib.caches()))
            assert seen == after[: layer + 1] + before[layer + 1 :], "each as late as its step allows"
            assert len(device.loads.held) == 2 - layer
        assert device.loads.waits == 0, "the caller waited for a copy"
        assert next(steps).all()
        assert list(steps) == []
        lib.settled()


@pytest.mark.long
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_closed_early_its_copies_end_before_its_memory_is_given_back(steps: int):
    kind, device = KINDS["flash attention"](), HeldDevice(make_rotating=KERNEL)
    with library(kind.groups, keys=kind.keys, device=device, transfer_mode="layerwise") as lib:
        lib.engine.store(TOKENS, lib.table(HERE, 32))
        retrieving = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32), at=AT)
        for _ in range(steps):
            next(retrieving)
        retrieving.close()
        assert not device.loads.held
        lib.settled()


@pytest.mark.long
@pytest.mark.parametrize("locked", [(), (0,), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("at", [0, AT])
@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
def test_a_pool_that_is_locked_in_part_serves_both_ways(mode: str, at: int, locked: tuple[int, ...]):
    kind, device = KINDS["flash attention"](), HeldDevice(make_rotating=KERNEL)
    transfer = device.transfer(kind.groups, CHUNK)
    shard = transfer.shard
    memory = [np.zeros(shard.nbytes, np.uint8) for _ in range(4)]
    leases = [Lease(one, shard, (0,) if place in locked else ()) for place, one in enumerate(memory)]

    def chunks(ids: list[int]) -> list[Copy]:
        return [Copy(lease, [Blocks(0, 0, ids[2 * n : 2 * n + 2])], layerwise=True) for n, lease in enumerate(leases)]

    copies = DeviceCopies(transfer, SizeMode(mode))  # type: ignore[arg-type]
    gathering, wanted = copies.gather(chunks(HERE)), moved(kind, 0, at)
    for layer in range(3):
        gathering.save(layer)
    gathering.finish()
    assert len(gathering.end()) == 4
    text = Rotator(kind.groups, shard, kind.keys).for_text([copy.blocks for copy in chunks(THERE)], 0, at)
    moving = [copy._replace(rotation=ChunkRotation(text, n) if at else None) for n, copy in enumerate(chunks(THERE))]
    scattering = copies.scatter(moving)
    for layer in range(3):
        scattering.wait(layer)
    assert not scattering.end()
    assert bits(list(kind.groups[0].caches.values())) == bits(wanted)
    assert not device.loads.held


def test_what_was_started_has_ended_when_a_text_out_of_order_is_refused():
    kind, device = KINDS["flash attention"](), HeldDevice(make_rotating=KERNEL)
    transfer = device.transfer(kind.groups, CHUNK)
    leases = [Lease(np.zeros(transfer.shard.nbytes, np.uint8), transfer.shard, (0,)) for _ in range(3)]
    blocks = [[Blocks(0, 0, [2 * n + 1, 2 * n + 2])] for n in range(3)]
    text = Rotator(kind.groups, transfer.shard, kind.keys).for_text(blocks[1:], 0, AT)
    copies = [Copy(lease, part) for lease, part in zip(leases, blocks, strict=True)]
    moving = [copy._replace(rotation=ChunkRotation(text, 1 - n)) for n, copy in enumerate(copies[1:])]
    with pytest.raises(ValueError, match="in their order"):
        DeviceCopies(transfer, SizeMode("bulk")).scatter([copies[0], *moving])
    assert not device.loads.held, "a copy may still write to memory that is given back"


@pytest.mark.parametrize("verb", ["retrieve", "retrieve_layer"])
@pytest.mark.parametrize("way", WAYS)
def test_a_chunk_that_has_changed_ends_what_is_moved(way: str, verb: str):
    kind, device = KINDS["flash attention"](), HeldDevice()
    with opened(kind, way, device, verify_pool="always") as lib:
        here, there = lib.table(HERE, 32), lib.table(THERE, 32)
        lib.engine.store(TOKENS, here)
        wanted, before = moved(kind, 0, AT), [one.clone() for one in lib.caches()]
        damage(lib, chunk=2)
        if verb == "retrieve":
            arrived = lib.engine.retrieve(TOKENS, there, at=AT)
        else:
            *_, arrived = lib.engine.retrieve_layer(TOKENS, there, at=AT)
        assert arrived.tolist() == [token < 16 for token in TOKENS]
        came, rest = THERE[:4], [n for n in range(NB) if n not in THERE]
        for now, after, old in zip(lib.caches(), wanted, before, strict=True):
            assert bits([now[:, came]]) == bits([after[:, came]])
            assert bits([now[:, rest]]) == bits([old[:, rest]])
        assert lib.engine.lookup(TOKENS) == 16, "it is not given out again"
        assert not device.loads.held
        lib.settled()


def damage(lib: Library, chunk: int) -> None:
    """Flips a bit of a chunk in the pool, in the last of its layers."""
    assert isinstance(lib.source, ThreadSource)
    running, size = lib.source.running, lib.settled()["used_nbytes"] // 4
    running.region.array[[*running.store.index._entries.values()][chunk].offset + size - 4096] ^= 1


@pytest.mark.parametrize("mode", ["bulk", "layerwise"])
def test_a_device_stores_by_layer_without_being_waited_for_before_the_end(mode: str):
    kind, device = KINDS["two groups"](), HeldDevice()
    with library(kind.groups, device=device, transfer_mode=mode) as lib:
        here, there, wanted = lib.table(HERE, 32), lib.table(THERE, 32), moved(kind, 0, 0)
        steps = lib.engine.store_layer(TOKENS, here)
        for layer in range(4):
            next(steps)
            assert len(device.stores.held) == (layer + 1 if mode == "layerwise" else 0)
        assert device.stores.waits == 0
        assert lib.engine.lookup(TOKENS) == 0
        next(steps)
        assert not device.stores.held
        assert list(steps) == []
        assert lib.engine.retrieve(TOKENS, there).all()
        assert bits(list(lib.caches())) == bits(wanted)
        lib.settled()


@pytest.mark.parametrize("mode", [(True, False, True), (True, False, False), (True, True, False), (False, True, True)])
@pytest.mark.parametrize("way", WAYS)
def test_caches_engine_and_request_may_be_in_inference_mode_or_not(way: str, mode: tuple[bool, bool, bool]):
    with torch.inference_mode(mode[0]):
        kind = KINDS["flash attention"]()
    with ExitStack() as stack:
        with torch.inference_mode(mode[1]):
            lib = stack.enter_context(opened(kind, way, HeldDevice()))
        lib.engine.store(TOKENS, lib.table(HERE, 32))
        with torch.inference_mode():
            wanted = moved(kind, 0, AT)
        with torch.inference_mode(mode[2]):
            *_, arrived = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32), at=AT)
            assert arrived.all()
            assert bits(list(lib.caches())) == bits(wanted)


def test_a_table_may_be_used_again_between_two_steps():
    kind, device = KINDS["flash attention"](), HeldDevice()
    with library(kind.groups, keys=kind.keys, device=device, transfer_mode="layerwise") as lib:
        lib.engine.store(TOKENS, lib.table(HERE, 32))
        wanted, table = moved(kind, 0, AT), np.array(THERE[:8], np.intp)
        steps = lib.engine.retrieve_layer(TOKENS, [table], at=AT)
        next(steps)
        next(steps)
        table[:] = 20
        assert [*steps][-1].all()
        assert bits(list(lib.caches())) == bits(wanted)


@pytest.mark.long
def test_the_last_step_holds_nothing_whether_or_not_the_generator_is_exhausted():
    kind, device = KINDS["flash attention"](), HeldDevice(make_rotating=KERNEL)
    with library(kind.groups, keys=kind.keys, device=device, transfer_mode="layerwise") as lib:
        storing = lib.engine.store_layer(TOKENS, lib.table(HERE, 32))
        for _ in range(4):
            next(storing)
        lib.settled()
        retrieving = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32), at=AT)
        for _ in range(5):
            mask = next(retrieving)
        assert mask is not None
        assert not device.loads.held
        lib.settled()


def test_what_turns_in_its_blocks_is_copied_once():
    kind, device = KINDS["each layer its own pace"](), HeldDevice()
    with library(kind.groups, keys=kind.keys, device=device, transfer_mode="bulk") as lib:
        lib.engine.store(TOKENS, lib.table(HERE, 32))
        *_, arrived = lib.engine.retrieve_layer(TOKENS, lib.table(THERE, 32), at=AT)
        assert arrived.all()
        assert device.loads.events == 1


def test_what_is_not_known_is_refused_by_name():
    kind = KINDS["flash attention"]()
    with library(kind.groups) as lib:
        table = lib.table(HERE, 32)
        for verb in (lib.engine.retrieve, lib.engine.retrieve_layer):
            with pytest.raises(ValueError, match="open the engine with `keys`"):
                verb(TOKENS, table, at=1)
    with library(kind.groups, keys=kind.keys) as lib, pytest.raises(ValueError, match="no position -4"):
        lib.engine.retrieve(TOKENS, table, at=-4)
    for keys, says in (
        ({"l7": Keys("2bthd", SLOW)}, "l7: .* no such layer"),
        ({"l0": Keys("bthd", SLOW)}, "l0: .* do not describe"),
        ({"l0": Keys("2tbhd", SLOW)}, "l0: .* not in blocks"),
        ({"l0": Keys("2bthd", torch.ones(7))}, "l0: .* 7 pairs do not fit"),
        ({"l0": Keys("2bthd", SLOW, packed="AMX")}, "l0: .* AMX"),
        ({"l0": Keys("bthd2", SLOW)}, "l0: .* do not describe"),
    ):
        with pytest.raises(LayoutMismatch, match=says):
            open_cache(kind.groups, MODEL, Config(pool_size="16 MiB", chunk_tokens=CHUNK), keys=keys)


def test_a_cache_of_two_layers_is_refused_where_it_would_turn_twice():
    kind = KINDS["flash attention"]()
    shared = kind.groups[0]._replace(caches={"l0": kind.groups[0].caches["l0"], "l1": kind.groups[0].caches["l0"]})
    with pytest.raises(LayoutMismatch, match=r"l1: .* also that of l0"):
        open_cache([shared], MODEL, Config(pool_size="16 MiB", chunk_tokens=CHUNK), keys={"l0": kind.keys["l0"]})


# ---- a whole model -------------------------------------------------------------------------------------------

LAYERS, HEAD, BLOCK = 2, 16, 4


class Reader:
    """A model of transformers whose texts lie in a paged cache, each from a block of its own on."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        rope = {"rope_type": "default", "rope_theta": 1000.0}
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=101,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=HEAD,
                rope_parameters=rope,
            )
        ).eval()
        caches = {f"l{n}": torch.zeros(2, NB, BLOCK, 2, HEAD) for n in range(LAYERS)}
        self.group = GroupCaches(caches, NB, BLOCK, 0)
        self.keys = dict.fromkeys(caches, Keys("2bthd", frequencies(rope, HEAD, Span(2048))))

    def read(self, text: Sequence[int], at: int) -> DynamicCache:
        """A text alone, computed at its position."""
        cache = DynamicCache(config=self.model.config)
        positions = torch.arange(at, at + len(text))[None]
        self.model(torch.tensor([text]), past_key_values=cache, position_ids=positions)
        return cache

    def write(self, cache: DynamicCache, blocks: Sequence[int]) -> None:
        for mine, theirs in zip(self.group.caches.values(), cache.layers, strict=True):
            for half, one in enumerate((theirs.keys, theirs.values)):
                mine[half, list(blocks)] = one[0].transpose(0, 1).unflatten(0, (-1, BLOCK))

    def answer(self, blocks: Sequence[int], question: Sequence[int]) -> torch.Tensor:
        """The logits of a question behind everything that these blocks hold."""
        cache = DynamicCache(config=self.model.config)
        for layer, mine in enumerate(self.group.caches.values()):
            keys, values = (one[list(blocks)].flatten(0, 1).transpose(0, 1)[None] for one in mine)
            cache.update(keys, values, layer)
        at = len(blocks) * BLOCK
        positions = torch.arange(at, at + len(question))[None]
        return self.model(torch.tensor([question]), past_key_values=cache, position_ids=positions).logits


@pytest.mark.process
def test_a_model_answers_from_texts_that_were_read_once_wherever_they_stand():
    reader, random = Reader(), np.random.default_rng(7)
    separator = [99]
    texts = [random.integers(0, 99, tokens).tolist() for tokens in (16, 24, 8)]
    tables = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12]]
    config = Config(pool_size="16 MiB", chunk_tokens=CHUNK)
    with torch.no_grad(), open_cache([reader.group], MODEL, config, keys=reader.keys) as engine:
        for text, table in zip(texts, tables, strict=True):
            reader.write(reader.read(text, 0), table)
            assert engine.store(text, [table]) == len(text)
        prompt = [*texts[1], *separator, *texts[2], *separator, *texts[0]]
        wanted, got = answers(reader, engine, prompt, separator)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def answers(
    reader: Reader, engine: CacheEngine, prompt: Sequence[int], separator: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A question behind the prompt's texts: as they are computed where they stand, and as they are retrieved there."""
    question, at = [7, 8, 9], 0
    places = list(range(20, 40))
    for one in segments(prompt, separator):
        text = prompt[one.start : one.end]
        reader.write(reader.read(text, at), places[at // BLOCK : (at + len(text)) // BLOCK])
        at += len(text)
    wanted = reader.answer(places[: at // BLOCK], question)
    left, at = list(range(40, 60)), 0
    for one in segments(prompt, separator):
        text = prompt[one.start : one.end]
        assert engine.retrieve(text, [left[at // BLOCK : (at + len(text)) // BLOCK]], at=at).all()
        at += len(text)
    return wanted, reader.answer(left[: at // BLOCK], question)
