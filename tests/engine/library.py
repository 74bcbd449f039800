"""What the tests of `CacheEngine` share: caches of several layouts over a real store in a thread, and what must hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from kvkeep.config import Config
from kvkeep.doors.library.cache_engine import CacheAccess, CacheEngine
from kvkeep.doors.library.open import Model, identity_of
from kvkeep.engine.copies.copies import Copies
from kvkeep.engine.copies.cpu import CpuCopies, Timing
from kvkeep.engine.copies.device import DeviceCopies
from kvkeep.engine.copies.mode import CopyMode, SizeMode
from kvkeep.engine.link import StoreSource
from kvkeep.testing.doubles.device import LOCKS, HeldDevice
from kvkeep.testing.doubles.store_thread import ThreadSource
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.keys import Keys, Rotator
from kvkeep.transfer.staged import StagedTransfer
from kvkeep.transfer.transfer import Transfer

NB, CHUNK = 80, 8
MODEL = Model("test", weights="same weights")
Wrap = Callable[[Transfer], Transfer]


def flash_attention(tokens: int = 4, nb: int = NB) -> torch.Tensor:
    return torch.zeros((2, nb, tokens, 2, 8), dtype=torch.bfloat16)


def flash_infer(tokens: int = 4, nb: int = NB) -> torch.Tensor:
    return torch.zeros((nb, 2, tokens, 2, 8), dtype=torch.float16)


def mla(tokens: int = 4, nb: int = NB) -> torch.Tensor:
    return torch.zeros((nb, tokens, 24), dtype=torch.bfloat16)


def cpu_packed(tokens: int = 4, nb: int = NB) -> torch.Tensor:
    return torch.zeros((nb, 2, tokens, 16), dtype=torch.float32)


def group(make: Callable[[int, int], torch.Tensor], layers: int, tokens: int = 4, name: str = "l") -> GroupCaches:
    return GroupCaches({f"{name}{n}": make(tokens, NB) for n in range(layers)}, NB, tokens, 0)


LAYOUTS: dict[str, Callable[[], list[GroupCaches]]] = {
    "flash attention": lambda: [group(flash_attention, 3)],
    "flash infer": lambda: [group(flash_infer, 2)],
    "mla": lambda: [group(mla, 3)],
    "cpu packed": lambda: [group(cpu_packed, 2)],
    "groups of different shape": lambda: [
        group(flash_attention, 2, 4, "full"),
        group(mla, 1, 2, "small"),
        group(cpu_packed, 2, 8, "wide"),
    ],
}


class Library:
    """An engine over `groups` and the store behind it."""

    def __init__(self, engine: CacheEngine, groups: list[GroupCaches], source: StoreSource) -> None:
        self.engine, self.groups, self.source = engine, groups, source

    def fill(self, seed: int) -> None:
        """Random bytes, NaNs among them, in every block."""
        random = np.random.default_rng(seed)
        for cache in self.caches():
            raw = random.integers(0, 256, cache.numel() * cache.element_size(), np.uint8)
            cache.copy_(torch.from_numpy(raw).view(cache.dtype).reshape(cache.shape))

    def caches(self) -> Iterator[torch.Tensor]:
        for one in self.groups:
            yield from one.caches.values()

    def pages(self) -> list[list[bytes]]:
        """Every block of every layer as bytes: by layer, all groups one after the other, then by block id."""
        layers = []
        for cache in self.caches():
            raw = cache.contiguous().view(torch.uint8).numpy()
            apart = cache.shape[0] == 2
            layers.append([(raw[:, n] if apart else raw[n]).tobytes() for n in range(NB)])
        return layers

    def table(self, ids: Sequence[int], tokens: int) -> list[list[int]]:
        """Block tables for so many tokens, each group's out of the same ids."""
        return [list(ids[: -(-tokens // one.block_tokens)]) for one in self.groups]

    def after(
        self, before: list[list[bytes]], sources: list[list[int]], targets: list[list[int]], mask: np.ndarray
    ) -> list[list[bytes]]:
        """The pages after exactly the tokens of the mask have come from the sources into the targets."""
        layers, at = [list(one) for one in before], 0
        for number, one in enumerate(self.groups):
            for _ in one.caches:
                for place, block in enumerate(targets[number]):
                    if mask[place * one.block_tokens : (place + 1) * one.block_tokens].any():
                        layers[at][block] = before[at][sources[number][place]]
                at += 1
        return layers

    def settled(self) -> dict[str, int]:
        """The store's figures, once nothing is pinned, being written or kept back any more."""
        figures = self.engine.store_figures()
        held = {
            name: figures[name] for name in ("pinned_nbytes", "writing_nbytes", "dead_nbytes", "quarantined_nbytes")
        }
        assert not any(held.values()), f"still held: {held}"
        if isinstance(self.source, ThreadSource):
            assert self.source.running.store.index.check() == ""
        return figures


@contextmanager
def library(
    groups: list[GroupCaches],
    source: StoreSource | None = None,
    wrap: Wrap = lambda one: one,
    layers: Sequence[str] = (),
    keys: Mapping[str, Keys] | None = None,
    **settings: object,
) -> Iterator[Library]:
    """An engine over these caches; the store is a thread's, with room for 16 chunks, unless another one is given."""
    made: Transfer = ReferenceTransfer(groups, CHUNK)
    if settings.pop("staged", False):
        made = StagedTransfer(groups, CHUNK)
    device, locked = settings.pop("device", None), settings.pop("locked", True)
    if isinstance(device, HeldDevice):
        made = device.transfer(groups, CHUNK)
    transfer = wrap(made)
    rotator = None if keys is None else Rotator(groups, made.shard, keys)
    clock, copier = settings.pop("clock", time.monotonic), settings.pop("copier", None)
    source = source or ThreadSource(16 * transfer.shard.nbytes, max_pinned_share=1.0)
    config = Config(**{"deadline_s": 20.0, "chunk_tokens": CHUNK, **settings})  # type: ignore[arg-type]
    order = transfer.shard.in_order(layers)
    copies: Copies
    if isinstance(transfer, DeviceTransfer):
        copies = DeviceCopies(transfer, SizeMode(config.transfer_mode, waits=True), order=order)
    else:
        mode = CopyMode(config.transfer_mode, possible=copier is not None)
        copies = CpuCopies(transfer, copier, mode, order=order, timing=Timing(clock))  # type: ignore[arg-type]
    access = CacheAccess(copies, LOCKS if device and locked else None, rotator, clock)  # type: ignore[arg-type]
    with CacheEngine(access, identity_of(MODEL, groups, CHUNK), source, config) as engine:
        if device:
            engine.lookup(range(CHUNK))  # maps the pool
            pool = engine._store._mapped._pool
            assert pool is not None
            pool.populated.wait(10.0)
            assert (pool.page_lock is not None and pool.page_lock.pinned_nbytes > 0) == locked
        yield Library(engine, groups, source)
