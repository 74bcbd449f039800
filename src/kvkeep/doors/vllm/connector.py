"""The class that vLLM 0.32 loads: its hooks, translated into the planner's and the worker's words.

Decides nothing. Load it with `--kv-transfer-config '{"kv_connector": "KVKeepConnector", "kv_connector_module_path":
"kvkeep.vllm", "kv_role": "kv_both"}'`. One instance lives in the scheduler, one in each worker; workers and
their instances exist first. Whatever goes wrong below is a miss.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request as VllmRequest

from kvkeep.config import Config
from kvkeep.core.identity import Identity, described, namespace
from kvkeep.core.layout import ChunkLayout
from kvkeep.doors.vllm import facts
from kvkeep.doors.vllm import identity as vllm_identity
from kvkeep.doors.vllm.adapters import Background, RankAdapters
from kvkeep.doors.vllm.cache import OwnCache
from kvkeep.doors.vllm.chain import Requests, chain_kind
from kvkeep.doors.vllm.loaded import Adapters
from kvkeep.doors.vllm.log import join_log, leave_log
from kvkeep.doors.vllm.messages import PlanMeta, RankMeta, ReportMeta
from kvkeep.doors.vllm.metrics import Differences, KVKeepPromMetrics, KVKeepStats
from kvkeep.engine.link import Link, hello_of, source_of
from kvkeep.engine.plan import RankInfo, Report
from kvkeep.engine.rank.open import early_loads, open_rank, wish_of
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.sources import load_config
from kvkeep.telemetry import Figures, Miss
from kvkeep.transfer.open import open_transfer, open_with_states
from kvkeep.transfer.pages import across_layers
from kvkeep.transfer.transfer import Opened
from kvkeep.wire.messages import Hello
from kvkeep.wire.pool_socket import PoolDoor

log = logging.getLogger("kvkeep")

START_LIMIT_S = 30.0
HIT_SOURCES = {"pool": CacheHitSource.HOST, "disk": CacheHitSource.DISK}  # of any other tier: unspecified


class KVKeepConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's view of kvkeep; see the module."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        self.config = _config(transfer_config.kv_connector_extra_config)
        join_log(self.config.log_level)
        self._open = True
        self.refusal = facts.refusal(vllm_config, kv_cache_config)
        self.worker: Worker | None = None
        self.planner: Planner | None = None
        self._own_cache: OwnCache | None = None
        self.figures = Figures()
        self.identity: Identity | None = None
        self._info: RankInfo | None = None
        self._writes_early = facts.writes_early(vllm_config)
        self._requests = Requests()
        self._background = Background()
        keeps = role is KVConnectorRole.WORKER and self.config.enabled and not self.refusal
        loras = vllm_config.lora_config if keeps else None
        self._adapters = RankAdapters(vllm_config.parallel_config.rank, loras, self._background.later)
        self._differences = Differences()
        self._fails_whole = facts.fails_whole(kv_cache_config)
        self._groups = facts.kept_groups(kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            if self.config.load_failure_policy == "recompute":
                transfer_config.kv_load_failure_policy = "recompute"  # vLLM reads it after this constructor
            log.info("kvkeep: kv_load_failure_policy is %s", transfer_config.kv_load_failure_policy)

    # ---- what vLLM asks of the class -----------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a cache may drop what it did not get to store."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True where loads go by layer: a whole graph would not wait for them."""
        return _config(extra_config).transfer_mode == "layerwise"

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Blocks outermost, with all layers side by side, where that is asked for; vLLM goes on where it cannot."""
        config = _config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        return "BLHNC" if config.cross_layer_blocks and config.transfer_mode != "layerwise" else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """The figures that another process sent, as an object again."""
        return KVKeepStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVKeepPromMetrics:
        """The kvkeep_* metrics of vLLM's /metrics."""
        return KVKeepPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Prepares the copies of this rank; LayoutMismatch (before serving) for a cache that cannot be copied."""
        if any(tensor.device.type == "cpu" for tensor in kv_caches.values()):
            facts.init_amx()
        rank = self._vllm_config.parallel_config.rank
        if self.refusal or not self.config.enabled:
            why = self.refusal or "enabled = false"
            log.warning("kvkeep: nothing is kept: %s", why)
            self._info = RankInfo(rank, os.getpid(), "", None, facts={}, refusal=why)
            return
        tokens = facts.chunk_tokens(self.config.chunk_tokens, self._kv_cache_config)
        opened = self._reached(kv_caches, tokens)
        door = PoolDoor()
        alone = self._vllm_config.parallel_config.world_size == 1
        whole = not facts.splits_batches(self._vllm_config)
        self.worker = open_rank(rank, opened, door, self.config, alone, whole)
        found = vllm_identity.worker_facts(self._vllm_config, kv_caches, opened.transfer.shard)
        states = opened.states.shard if opened.states is not None else None
        self._info = RankInfo(
            rank, os.getpid(), door.path, opened.transfer.shard, facts=found, states=states, early=self.worker.early
        )

    def _reached(self, kv_caches: Mapping[str, torch.Tensor], tokens: int) -> Opened:
        """What copies from and to the registered caches."""
        chunks, states = (facts.group_caches(kv_caches, self._kv_cache_config, kind) for kind in self._groups)
        if not self.config.may_go_by_layer(next(iter(kv_caches.values())).device.type == "cpu"):
            chunks = [across_layers(group) for group in chunks]
        if not states:
            return open_transfer(chunks, tokens, wish_of(self.config))
        return open_with_states(chunks, states, tokens)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Who this rank is, for the planner."""
        return RankMeta(self._info) if self._info is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The step is about to write to blocks, whoever had them: what a device still stores of them comes first."""
        if self.worker is not None:
            self.worker.before_writes()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Starts the step's loads."""
        if self.worker is not None:
            sent = self._sent()
            self.worker.start_loads(self._adapters.checked(sent.plan, sent.expected))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Returns when what the step loads of this layer is there."""
        if self.worker is not None:
            self.worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Hands the layer's part of the step's stores over, where they are made by layer."""
        if self.worker is not None:
            self.worker.save_layer(self._sent().plan, layer_name)

    def wait_for_save(self) -> None:
        """Runs the step's stores. No block needs to be held: what writes to one later comes after its copy."""
        if self.worker is not None:
            self.worker.start_stores(self._sent().plan)
            if self._writes_early:
                self.worker.before_writes()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests whose asynchronous loads have ended; what failed is named by block where that is enough."""
        if self.worker is None:
            return KVConnectorTransferResults()
        self.worker.poll(self._sent().plan)
        loaded = self.worker.results.take_loaded()
        failed = {name for name, arrived in loaded.items() if not arrived and self._fails_whole}
        return KVConnectorTransferResults(finished_recving=set(loaded), failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks whose load failed, unless the request is named instead."""
        if self.worker is None:
            return set()
        failed = self.worker.results.take_failed_blocks()
        return set() if self._fails_whole else failed

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this rank has finished since the last step."""
        report = self.worker.results.take_report() if self.worker is not None else Report()
        loads, resident = self._adapters.take()
        return ReportMeta(report, loads, resident) if report or loads or resident else None

    # ---- scheduler -----------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        """All ranks are known: the store is started or joined. A start that cannot work ends here, before serving."""
        ranks = sorted((meta.info for meta in metadata.values()), key=lambda info: info.rank)
        if any(info.refusal for info in ranks):
            self.refusal = next(info.refusal for info in ranks if info.refusal)
            return
        shards = tuple(info.shard for info in ranks if info.shard is not None)
        layout = ChunkLayout(shards)
        contents = vllm_identity.fingerprints(self._vllm_config, self.config.outlived)
        kind = chain_kind(self.config.chain, layout.chunk_tokens, self._vllm_config, self._kv_cache_config)
        self._requests = Requests(Adapters(len(shards)), kind)
        self.identity = vllm_identity.identity(
            self._vllm_config, self._kv_cache_config, ranks, layout.chunk_tokens, contents, kind
        )
        states = tuple(info.states for info in ranks if info.states is not None)
        of_states = ChunkLayout(states) if states else None
        link = self._link(ranks, layout, of_states)
        link.start(START_LIMIT_S)
        beside = self.config.load == "async" or facts.never_in_step(self._vllm_config, self._kv_cache_config)
        options = PlannerOptions(
            deadline_s=self.config.deadline_s,
            patience_s=self.config.patience_s,
            store_generated=self.config.store_generated,
            min_hit_tokens=self.config.min_hit_tokens,
            beside_steps=beside,
            beside_busy=self.config.load == "auto",
            early=early_loads(self.config, ranks, beside),
        )
        self.planner = Planner(link, layout, options, self.figures, states=of_states)

    def _link(self, ranks: list[RankInfo], layout: ChunkLayout, states: ChunkLayout | None) -> Link:
        def hello(resumes: int) -> Hello:
            assert self.identity is not None
            return hello_of(
                f"vllm {self._vllm_config.model_config.model}",
                (namespace(self.identity), described(self.identity)),
                (layout, states),
                [info.pid for info in ranks],
                verify_every=self.config.verify_every,
                resumes=resumes,
            )

        least_nbytes = layout.nbytes + (states.nbytes if states is not None else 0)
        return Link(source_of(self.config, least_nbytes, layout.chunk_tokens), hello, [info.door for info in ranks])

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """The scheduler's cache is there, before any request."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._own_cache = OwnCache(kv_cache_manager)

    def on_new_request(self, request: VllmRequest) -> None:
        """Remembers the request; with an adapter it may begin with another content than that of now."""
        self._notice_reset()
        self._requests.add(request)
        if self.planner is not None:
            self.planner.arrived(request.request_id, request.all_token_ids)
            if request.lora_request is None:
                self.planner.expect(self._requests.translated(request))

    def get_num_new_matched_tokens(self, request: VllmRequest, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded, and whether beside the steps."""
        self._notice_reset()
        if self.planner is None:
            return 0, False
        claim = self.planner.match(self._requests.translated(request), num_computed_tokens)
        return claim, bool(claim) and self.planner.loads_beside(request.request_id)

    def update_state_after_alloc(self, request: VllmRequest, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks, `num_external_tokens` of them to be loaded."""
        if self.planner is not None:
            ordered = self._groups.tables
            translated = self._requests.translated(request)
            self.planner.admitted(translated, num_external_tokens, lambda: ordered(blocks.get_block_ids()))
        else:
            self.figures.miss(Miss.REFUSED if self.config.enabled else Miss.BYPASS)

    def get_external_cache_hit_sources(self, request: VllmRequest, num_external_tokens: int) -> dict[Any, int]:
        """Where the claimed tokens come from, for vLLM's own metrics."""
        claimed = self.planner.claimed_from(request.request_id) if self.planner is not None else {}
        counts: Counter[CacheHitSource] = Counter()
        for source, tokens in claimed.items():
            counts[HIT_SOURCES.get(source, CacheHitSource.EXTERNAL_UNSPECIFIED)] += tokens
        return dict(counts)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The step's plan."""
        self._notice_reset()
        if self.planner is None:
            return PlanMeta()
        state, ordered = scheduler_output.kv_connector_block_state, self._groups.tables
        steps = self._requests.scheduled(scheduler_output, self._groups.left_behind)
        plan = self.planner.plan_step(steps, lambda name: ordered(state.get_block_ids(name) or ()))
        return PlanMeta(plan, self._requests.expected(plan.loaded))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """The step's output is in: what all ranks stored becomes readable, what failed is forgotten by vLLM too."""
        self._notice_reset()
        found = connector_output.kv_connector_worker_meta
        meta = found if isinstance(found, ReportMeta) else ReportMeta()
        if self.planner is None:
            return
        self.planner.step_over()
        self.planner.doubt(self._requests.step_over(meta.loads, meta.resident))
        if meta.report and (forget := self.planner.step_done(meta.report, self._kv_cache_manager.get_block_ids)):
            self._kv_cache_manager.evict_blocks(forget)

    def request_finished(self, request: VllmRequest, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks are free at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: VllmRequest, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks are free at once."""
        self._requests.drop(request.request_id)
        if self.planner is not None:
            self.planner.ended(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """True while a step's report is still to come, so that an idle engine makes the step that brings it."""
        return self.planner is not None and self.planner.awaits_report()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The planner's figures since the last step; workers have none of their own."""
        if self.role is not KVConnectorRole.SCHEDULER:
            return None
        return self._differences.since_last(self.figures.rows())

    def reset_cache(self) -> bool | None:
        """The engine's cache is void or its weights are new: a new epoch begins, under a name that nobody else has."""
        self._was_emptied()  # vLLM empties its own before it asks for this
        self._begin_epoch()
        return True

    def _was_emptied(self) -> bool:
        """Whether vLLM has emptied its own cache since this was last asked."""
        emptied = self._own_cache is not None and self._own_cache.was_emptied()
        if emptied:
            self._requests.own_cache_emptied()
        return emptied

    def _notice_reset(self) -> None:
        """Begins an epoch where vLLM has emptied its own cache and, as is its default, has not told its connector."""
        if self._was_emptied() and self.config.local_reset == "forget":
            log.info(
                "kvkeep: vLLM's prefix cache was reset, its weights may be others: what was kept is given no more "
                '(local_reset = "keep" would keep it)'
            )
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        if self.planner is not None and self.identity is not None:
            epoch = secrets.randbits(62)
            self.identity = msgspec.structs.replace(self.identity, epoch=epoch)
            self.planner.reset(namespace(self.identity), described(self.identity))

    def shutdown(self) -> None:
        """Ends the session and a private store; vLLM may never call it, then their sockets' end of file does."""
        self._background.close()
        if self.worker is not None:
            self.worker.close()
        if self.planner is not None:
            self.planner.close()
            self.planner = None
        if self._open:
            leave_log()
            self._open = False

    def _sent(self) -> PlanMeta:
        meta = self._get_connector_metadata()
        assert isinstance(meta, PlanMeta)
        return meta


def _config(extra: Mapping[str, object] | None) -> Config:
    return load_config(extra or {}, os.environ)
