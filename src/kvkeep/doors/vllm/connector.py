"""The class that vLLM 0.32 loads: each of its hooks calls the planner or the worker in kvkeep's own terms.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVKeepConnector",
      "kv_connector_module_path": "kvkeep.vllm", "kv_role": "kv_both"}'

vLLM makes one instance in each worker process, and then one in the scheduler. A worker's instance has a `worker`, which
copies between the paged cache and the pool; the scheduler's has a `planner`, which asks the store and plans each step's
copies; either is None where nothing is kept. `start` makes them, `facts`, `identity` and `chain` read vLLM's settings
and requests; this module decides nothing. Whatever goes wrong below is a miss: the engine computes the tokens.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request as VllmRequest

from kvkeep.config import Config
from kvkeep.core.identity import Identity
from kvkeep.doors.vllm import facts
from kvkeep.doors.vllm.adapters import Background, RankAdapters
from kvkeep.doors.vllm.chain import Requests
from kvkeep.doors.vllm.log import join_log, leave_log
from kvkeep.doors.vllm.messages import PlanMeta, RankMeta, ReportMeta
from kvkeep.doors.vllm.metrics import Differences, KVKeepPromMetrics, KVKeepStats
from kvkeep.doors.vllm.start import EngineConfig, Introduction, open_planner, open_worker, refused
from kvkeep.engine.plan import RankInfo, Report
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.planner import Planner
from kvkeep.sources import load_config
from kvkeep.telemetry import Figures, Miss

log = logging.getLogger("kvkeep")

HIT_SOURCES = {"pool": CacheHitSource.HOST, "disk": CacheHitSource.DISK}  # of any other tier: unspecified


class OwnCache:
    """Notices when vLLM empties its own prefix cache, which vLLM reports to a connector only where it is asked to.

    Only emptying it as a whole replaces its map of block hashes by another object.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._maps = self._maps_now()

    def was_emptied(self) -> bool:
        """True if it was emptied since the last call."""
        before, self._maps = self._maps, self._maps_now()
        return any(old is not new for old, new in zip(before, self._maps, strict=True))

    def _maps_now(self) -> list[BlockHashToBlockMap]:
        # the maps themselves, not their ids: an id may be used again once its map is gone
        return [
            manager.block_pool.cached_block_hash_to_block for manager in self._manager.coordinator.single_type_managers
        ]


class KVKeepConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's hooks, in the order in which vLLM calls them: of the class, of a worker, of the scheduler."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        self.config = _config(transfer_config.kv_connector_extra_config)
        join_log(self.config.log_level)
        self._logs = True
        self._engine = EngineConfig(vllm_config, kv_cache_config, self.config)
        self._groups = facts.kept_groups(kv_cache_config)
        self._fails_whole = facts.fails_whole(kv_cache_config)
        self._writes_early = facts.writes_early(vllm_config)
        self.refusal = facts.refusal(vllm_config, kv_cache_config)
        # a rank's half
        self.worker: Worker | None = None
        self._info: RankInfo | None = None
        self._background = Background()
        keeps = role is KVConnectorRole.WORKER and self.config.enabled and not self.refusal
        loras = vllm_config.lora_config if keeps else None
        self._adapters = RankAdapters(vllm_config.parallel_config.rank, loras, self._background.later)
        # the scheduler's half
        self.planner: Planner | None = None
        self.figures = Figures()
        self._differences = Differences()
        self._requests = Requests()
        self._introduction: Introduction | None = None
        self._own_cache: OwnCache | None = None
        if role is KVConnectorRole.SCHEDULER:
            if self.config.load_failure_policy == "recompute":
                transfer_config.kv_load_failure_policy = "recompute"  # vLLM reads it after this constructor
            log.info("kvkeep: kv_load_failure_policy is %s", transfer_config.kv_load_failure_policy)

    @property
    def identity(self) -> Identity | None:
        """What must match for chunks to be reused; None before the planner is there."""
        return self._introduction.identity if self._introduction is not None else None

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
        """Ask for blocks that hold all their layers side by side, where that is set; vLLM goes on where it cannot."""
        config = _config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        return "BLHNC" if config.cross_layer_blocks and config.transfer_mode != "layerwise" else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Make an object of the figures that another process sent."""
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
        """Open the copies of this rank; LayoutMismatch (before serving) for a cache that cannot be copied."""
        if any(tensor.device.type == "cpu" for tensor in kv_caches.values()):
            facts.init_amx()
        if self.refusal or not self.config.enabled:
            why = self.refusal or "enabled = false"
            log.warning("kvkeep: nothing is kept: %s", why)
            self._info = refused(self._vllm_config.parallel_config.rank, why)
            return
        self.worker, self._info = open_worker(self._engine, kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Say who this rank is; vLLM hands it to the scheduler's instance."""
        return RankMeta(self._info) if self._info is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Order the device's copies out of blocks before the step's writes to them, whoever the blocks belonged to."""
        if self.worker is not None:
            self.worker.before_writes()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's loads; fail those whose request's adapter is not the one that their KV was computed with."""
        if self.worker is not None:
            sent = self._sent()
            self.worker.start_loads(self._adapters.checked(sent.plan, sent.expected))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until what the step loads of this layer is in its blocks."""
        if self.worker is not None:
            self.worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Start the layer's part of the step's stores, where they are made by layer."""
        if self.worker is not None:
            self.worker.save_layer(self._sent().plan, layer_name)

    def wait_for_save(self) -> None:
        """Start the step's stores. No block is held for them: whatever writes to it later is ordered after its copy."""
        if self.worker is not None:
            self.worker.start_stores(self._sent().plan)
            if self._writes_early:
                self.worker.before_writes()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Name the requests whose loads beside the steps have ended, and those that failed as a whole."""
        if self.worker is None:
            return KVConnectorTransferResults()
        self.worker.poll(self._sent().plan)
        loaded = self.worker.results.take_loaded()
        failed = {name for name, arrived in loaded.items() if not arrived and self._fails_whole}
        return KVConnectorTransferResults(finished_recving=set(loaded), failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Name the blocks whose load failed, unless `get_transfer_results` names the request instead."""
        if self.worker is None:
            return set()
        failed = self.worker.results.take_failed_blocks()
        return set() if self._fails_whole else failed

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Report what this rank has copied, and which adapters it has loaded, since the last step."""
        report = self.worker.results.take_report() if self.worker is not None else Report()
        loads, resident = self._adapters.take()
        return ReportMeta(report, loads, resident) if report or loads or resident else None

    # ---- scheduler -----------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        """Start or join the store: all ranks are known. A start that cannot work ends here, before serving."""
        ranks = sorted((meta.info for meta in metadata.values()), key=lambda info: info.rank)
        self.refusal = next((info.refusal for info in ranks if info.refusal), self.refusal)
        if not any(info.refusal for info in ranks):
            self.planner, self._requests, self._introduction = open_planner(self._engine, ranks, self.figures)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Watch vLLM's own prefix cache from now on, before any request."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._own_cache = OwnCache(kv_cache_manager)

    def on_new_request(self, request: VllmRequest) -> None:
        """Remember the request; ask for its prefix already, unless its adapter may change before it runs."""
        self._notice_reset()
        self._requests.add(request)
        if self.planner is not None:
            self.planner.announce(request.request_id, request.all_token_ids)
            if request.lora_request is None:
                self.planner.expect(self._requests.translated(request))

    def get_num_new_matched_tokens(self, request: VllmRequest, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens can be loaded (None: ask again next step), and whether beside the steps."""
        self._notice_reset()
        if self.planner is None:
            return 0, False
        claim = self.planner.match(self._requests.translated(request), num_computed_tokens)
        return claim, bool(claim) and self.planner.loads_beside(request.request_id)

    def update_state_after_alloc(self, request: VllmRequest, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load of `num_external_tokens` tokens into the blocks that vLLM has given the request."""
        if self.planner is not None:
            ordered = self._groups.tables
            translated = self._requests.translated(request)
            self.planner.admit(translated, num_external_tokens, lambda: ordered(blocks.get_block_ids()))
        else:
            self.figures.miss(Miss.REFUSED if self.config.enabled else Miss.BYPASS)

    def get_external_cache_hit_sources(self, request: VllmRequest, num_external_tokens: int) -> dict[Any, int]:
        """Say where the claimed tokens come from, for vLLM's own metrics."""
        claimed = self.planner.claimed_from(request.request_id) if self.planner is not None else {}
        counts: Counter[CacheHitSource] = Counter()
        for source, tokens in claimed.items():
            counts[HIT_SOURCES.get(source, CacheHitSource.EXTERNAL_UNSPECIFIED)] += tokens
        return dict(counts)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Plan the step's copies."""
        self._notice_reset()
        if self.planner is None:
            return PlanMeta()
        state, ordered = scheduler_output.kv_connector_block_state, self._groups.tables
        steps = self._requests.scheduled(scheduler_output, self._groups.left_behind)
        plan = self.planner.plan_step(steps, lambda name: ordered(state.get_block_ids(name) or ()))
        return PlanMeta(plan, self._requests.expected(plan.loaded))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the step's reports: commit what all ranks stored, have vLLM forget the blocks whose load failed."""
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
        """Forget the request; its blocks are free at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: VllmRequest, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; its blocks are free at once."""
        self._requests.drop(request.request_id)
        if self.planner is not None:
            self.planner.end(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """True while a step's report is still to come: an idle engine then makes the step that brings it."""
        return self.planner is not None and self.planner.awaits_report()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Return the planner's figures since the last step; workers have none of their own."""
        if self.role is not KVConnectorRole.SCHEDULER:
            return None
        return self._differences.since_last(self.figures.rows())

    def reset_cache(self) -> bool | None:
        """Begin an epoch: the engine's cache is void or its weights are new, so nothing kept so far may be given."""
        self._was_emptied()  # vLLM empties its own before it asks for this
        self._begin_epoch()
        return True

    def _was_emptied(self) -> bool:
        """True if vLLM has emptied its own prefix cache since the last call."""
        emptied = self._own_cache is not None and self._own_cache.was_emptied()
        if emptied:
            self._requests.own_cache_emptied()
        return emptied

    def _notice_reset(self) -> None:
        """Begin an epoch where vLLM has emptied its own cache without a word to its connector, as is its default."""
        if self._was_emptied() and self.config.local_reset == "forget":
            log.info(
                "kvkeep: vLLM's prefix cache was reset, so its weights may have changed: chunks kept before are not "
                'reused (local_reset = "keep" would reuse them)'
            )
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        if self.planner is not None and self._introduction is not None:
            self.planner.reset(*self._introduction.begin_epoch())

    def shutdown(self) -> None:
        """End the session and a private store. vLLM may never call this: then the end of their sockets ends them."""
        self._background.close()
        if self.worker is not None:
            self.worker.close()
        if self.planner is not None:
            self.planner.close()
            self.planner = None
        if self._logs:
            leave_log()
            self._logs = False

    def _sent(self) -> PlanMeta:
        meta = self._get_connector_metadata()
        assert isinstance(meta, PlanMeta)
        return meta


def _config(extra: Mapping[str, object] | None) -> Config:
    return load_config(extra or {}, os.environ)
