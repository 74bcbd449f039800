"""Starts the two halves of the connector: a rank's worker over its caches, and the planner once all ranks are known.

Both run before vLLM 0.32 serves a request: a start that cannot work ends here, with an error that names the cure.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvkeep.config import Config
from kvkeep.core.identity import Identity, described, namespace
from kvkeep.core.layout import ChunkLayout
from kvkeep.doors.vllm import facts
from kvkeep.doors.vllm import identity as vllm_identity
from kvkeep.doors.vllm.chain import Requests, chain_kind
from kvkeep.doors.vllm.loaded import Adapters
from kvkeep.engine.link import Link, hello_of, source_of
from kvkeep.engine.plan import RankInfo
from kvkeep.engine.rank.open import early_loads, open_rank, wish_of
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.telemetry import Figures
from kvkeep.transfer.open import open_transfer, open_with_states
from kvkeep.transfer.pages import across_layers
from kvkeep.transfer.transfer import Opened
from kvkeep.wire.messages import Hello
from kvkeep.wire.pool_socket import PoolDoor

START_LIMIT_S = 30.0


class EngineConfig(NamedTuple):
    """What an engine's settings are: vLLM's, those of its paged cache, and kvkeep's."""

    vllm: VllmConfig
    cache: KVCacheConfig
    kvkeep: Config


@dataclass
class Introduction:
    """Who this engine is to its store, at the first connection and at each later one."""

    identity: Identity
    name: str
    layout: ChunkLayout
    states: ChunkLayout | None
    pids: Sequence[int]
    verify_every: int

    def hello(self, resumes: int) -> Hello:
        """Make the first message of a connection; `resumes` is the session that it goes on with (0: none)."""
        return hello_of(
            self.name,
            (namespace(self.identity), described(self.identity)),
            (self.layout, self.states),
            self.pids,
            verify_every=self.verify_every,
            resumes=resumes,
        )

    def begin_epoch(self) -> tuple[bytes, str]:
        """Take a namespace that nobody else has; return it with the identity in words."""
        self.identity = msgspec.structs.replace(self.identity, epoch=secrets.randbits(62))
        return namespace(self.identity), described(self.identity)


class Scheduling(NamedTuple):
    """The scheduler's half, started."""

    planner: Planner
    requests: Requests
    introduction: Introduction


def open_worker(engine: EngineConfig, kv_caches: Mapping[str, torch.Tensor]) -> tuple[Worker, RankInfo]:
    """Start a rank's half over the caches that vLLM registers; LayoutMismatch for a cache that cannot be copied."""
    parallel, config = engine.vllm.parallel_config, engine.kvkeep
    opened = _open_transfer(engine, kv_caches)
    door = PoolDoor()
    alone, whole = parallel.world_size == 1, not facts.splits_batches(engine.vllm)
    worker = open_rank(parallel.rank, opened, door, config, alone=alone, whole=whole)
    shard = opened.transfer.shard
    said = vllm_identity.worker_facts(engine.vllm, kv_caches, shard)
    states = opened.states.shard if opened.states is not None else None
    return worker, RankInfo(parallel.rank, os.getpid(), door.path, shard, facts=said, states=states, early=worker.early)


def refused(rank: int, why: str) -> RankInfo:
    """What a rank says of itself that keeps nothing."""
    return RankInfo(rank, os.getpid(), "", None, facts={}, refusal=why)


def open_planner(engine: EngineConfig, ranks: Sequence[RankInfo], figures: Figures) -> Scheduling:
    """Start the scheduler's half for these ranks (in order), and start or join its store.

    Raise ConfigError or StoreGone where a store of our own cannot start within 30 s; go on without a shared one.
    """
    config = engine.kvkeep
    layout = ChunkLayout(tuple(info.shard for info in ranks if info.shard is not None))
    state_shards = tuple(info.states for info in ranks if info.states is not None)
    states = ChunkLayout(state_shards) if state_shards else None
    kind = chain_kind(config.chain, layout.chunk_tokens, engine.vllm, engine.cache)
    contents = vllm_identity.fingerprints(engine.vllm, config.outlived)
    introduction = Introduction(
        identity=vllm_identity.identity(
            engine.vllm, engine.cache, ranks, layout.chunk_tokens, contents=contents, chain=kind
        ),
        name=f"vllm {engine.vllm.model_config.model}",
        layout=layout,
        states=states,
        pids=[info.pid for info in ranks],
        verify_every=config.verify_every,
    )
    least_nbytes = layout.nbytes + (states.nbytes if states is not None else 0)
    source = source_of(config, least_nbytes, layout.chunk_tokens)
    link = Link(source, introduction.hello, [info.door for info in ranks])
    link.start(START_LIMIT_S)
    planner = Planner(link, layout, _planner_options(engine, ranks), figures, states=states)
    return Scheduling(planner, Requests(Adapters(len(layout.shards)), kind), introduction)


def _planner_options(engine: EngineConfig, ranks: Sequence[RankInfo]) -> PlannerOptions:
    config = engine.kvkeep
    beside = config.load == "async" or facts.never_in_step(engine.vllm, engine.cache)
    return PlannerOptions(
        deadline_s=config.deadline_s,
        patience_s=config.patience_s,
        store_generated=config.store_generated,
        min_hit_tokens=config.min_hit_tokens,
        beside_steps=beside,
        beside_busy=config.load == "auto",
        early=early_loads(config, ranks, beside),
    )


def _open_transfer(engine: EngineConfig, kv_caches: Mapping[str, torch.Tensor]) -> Opened:
    """What copies from and to the registered caches."""
    config = engine.kvkeep
    tokens = facts.chunk_tokens(config.chunk_tokens, engine.cache)
    chunks, states = (facts.group_caches(kv_caches, engine.cache, kind) for kind in facts.kept_groups(engine.cache))
    if not config.may_go_by_layer(next(iter(kv_caches.values())).device.type == "cpu"):
        chunks = [across_layers(group) for group in chunks]
    if not states:
        return open_transfer(chunks, tokens, wish_of(config))
    return open_with_states(chunks, states, tokens)
