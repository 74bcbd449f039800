"""Opens a `CacheEngine` for a program's model, cache and settings.

The identity decides whether bytes may be reused. It is made of what the program says, and of what its tensors show
(shapes, dtypes, the order of their dimensions). Knows nothing about requests.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import torch

from kvkeep import __version__
from kvkeep.config import Config
from kvkeep.core.identity import SCHEMA, GroupIdentity, Identity
from kvkeep.core.key import DEFAULT_SEED
from kvkeep.core.layout import VERSION as LAYOUT_VERSION
from kvkeep.core.layout import chunk_tokens_for
from kvkeep.doors.library.cache_engine import CacheAccess, CacheEngine
from kvkeep.engine.copies.open import open_copies
from kvkeep.engine.link import source_of
from kvkeep.engine.rank.open import wish_of
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.open import open_transfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.rope.keys import Keys, Rotator

log = logging.getLogger("kvkeep")


@dataclass(frozen=True)
class Model:
    """What a program says of its model.

    `weights` is a fingerprint of their content (`doors.fingerprint` makes one of a folder); without one nothing is
    shared with another engine. Of a model that is cut into `ranks` parts this engine has part `rank`. Whatever else the
    bytes depend on belongs into `notes`.
    """

    name: str
    weights: str = ""
    revision: str | None = None
    quantization: str | None = None
    compute_dtype: str = ""
    attention: str = ""
    rope: str = ""
    rank: int = 0
    ranks: int = 1
    notes: str = ""


def open_cache(
    groups: Sequence[GroupCaches],
    model: Model,
    config: Config | None = None,
    layers: Sequence[str] = (),
    keys: Mapping[str, Keys] | None = None,
) -> CacheEngine:
    """An engine over these caches, with a private store or the shared one that `config.store` names.

    `layers` are all layers' names in the order in which the engine computes them (none: as they are registered). `keys`
    says, by layers' names, how K carries its position, so that texts may be retrieved at another one; it is empty where
    no layer's K does. An absent shared store is waited for (`config.store_wait_s`), then looked for between calls.
    Raises ConfigError or StoreGone if a private store cannot be started, LayoutMismatch for a cache that cannot be
    copied, or whose K cannot be moved, ValueError for `layers` that do not name every layer once.
    """
    config = config or Config()
    block_tokens = [group.block_tokens for group in groups]
    tokens = chunk_tokens_for(config.chunk_tokens, block_tokens)
    if tokens != config.chunk_tokens:
        log.info(
            "kvkeep: chunks of %d tokens, whole blocks of %s (chunk_tokens = %d)",
            tokens,
            block_tokens,
            config.chunk_tokens,
        )
    opened = open_transfer(groups, tokens, wish_of(config))
    log.info("kvkeep: copies: %s", opened.text)
    rotator = None if keys is None else Rotator(groups, opened.transfer.shard, keys)
    if rotator is not None and isinstance(opened.transfer, DeviceTransfer):
        opened.transfer.prepare_rotations(rotator.alike)
    source = source_of(config, opened.transfer.shard.nbytes, tokens)
    copies = open_copies(opened, config.transfer_mode, alone=model.ranks == 1, beside=False, layers=layers)
    with ExitStack() as failing:
        failing.callback(copies.close)
        access = CacheAccess(copies, opened.pin_calls, rotator)
        engine = CacheEngine(access, identity_of(model, groups, tokens), source, config)
        failing.pop_all()
    return engine


def identity_of(model: Model, groups: Sequence[GroupCaches], chunk_tokens: int) -> Identity:
    """The identity of a model over these caches; without a fingerprint of the weights, of this engine alone."""
    dtypes = sorted({str(cache.dtype) for group in groups for cache in group.caches.values()})
    return Identity(
        schema=SCHEMA,
        layout=LAYOUT_VERSION,
        model=model.name,
        revision=model.revision,
        weights=model.weights or f"not named: only this start, {secrets.token_hex(16)}",
        files="",
        load_format="",
        load_seed=None,
        epoch=0,
        quantization=model.quantization,
        compute_dtype=model.compute_dtype,
        kv_dtype=", ".join(dtypes),
        kv_scales=None,
        groups=tuple(_group(group) for group in groups),
        rope=model.rope,
        max_model_len=None,
        engine="kvkeep.CacheEngine",
        engine_version=__version__,
        platform="",
        settings={},
        attention_backend=model.attention,
        kv_layout="; ".join([f"rank {model.rank}", model.notes, *map(_arrangement, groups)]),
        instruction_set=None,
        tp=model.ranks,
        pp=1,
        dcp=1,
        chunk_tokens=chunk_tokens,
        chain="kvkeep",
        hash_name="sha256_cbor",
        hash_seed=DEFAULT_SEED,
        codec=None,
    )


def _group(group: GroupCaches) -> GroupIdentity:
    return GroupIdentity(
        kind="sliding_window" if group.window else "full",
        layers=tuple(group.caches),
        kv_heads=0,  # it is in the layout: the shapes that the tensors have
        head_size=0,
        block_tokens=group.block_tokens,
        window=group.window or None,
    )


def _arrangement(group: GroupCaches) -> str:
    """How the layers' pages are arranged, without the number of blocks, as "32 x torch.bfloat16 ..."."""
    pages = [_page(cache, group.num_blocks) for cache in group.caches.values()]
    return ", ".join(f"{len(list(same))} x {page}" for page, same in groupby(pages))


def _page(cache: torch.Tensor, num_blocks: int) -> str:
    """A page's dtype, its dimensions and the steps between their elements; K and V apart where blocks come second."""
    apart = cache.dim() > 2 and cache.shape[0] == 2 and cache.shape[1] % num_blocks == 0
    page = cache[0, 0] if apart else cache[0]
    return f"{cache.dtype} {'k,v ' if apart else ''}{list(page.shape)} by {list(page.stride())}"
