"""kvkeep's figures in vLLM's log and at its /metrics.

Passes on what the planner counted, as differences since the last time. Knows nothing about what the figures mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kvkeep.telemetry import COUNTERS, GAUGES, TIER_COUNTERS, Figure, Miss

MISSES = {f"miss_{why.value}": why.meaning for why in Miss}


@dataclass
class KVKeepStats(KVConnectorStats):
    """Counters since the last time and gauges as they are.

    vLLM carries `data` from process to process: it maps a figure's name, or NAME:TIER, to its amount.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval's counters; its gauges replace ours."""
        merged = dict(self.data)
        for key, amount in other.data.items():
            merged[key] = amount if key in GAUGES else merged.get(key, 0) + amount
        return KVKeepStats(merged)

    def reduce(self) -> dict[str, int | float]:
        """What the log shows: everything that is not zero."""
        return {key: amount for key, amount in self.data.items() if amount}

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not any(self.data.values())


class Differences:
    """Turns the planner's running totals into the amounts since the last look."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def since_last(self, figures: Iterable[Figure]) -> KVKeepStats | None:
        """The new amounts; None if nothing has changed."""
        totals = {f"{name}:{tier}" if tier else name: value for name, tier, value in figures}
        if totals == self._last:
            return None
        data = {key: total if key in GAUGES else total - self._last.get(key, 0) for key, total in totals.items()}
        self._last = totals
        return KVKeepStats(data)


class KVKeepPromMetrics(KVConnectorPromMetrics):
    """One Prometheus metric a figure, named kvkeep_*, with vLLM's own labels and, for figures of tiers, `tier`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier()
        self._labels = per_engine_labelvalues
        self._metrics: dict[str, dict[int, Any]] = {}
        for names, kind in ((COUNTERS, Counter), (MISSES, Counter), (GAUGES, Gauge)):
            for name, text in names.items():
                metric = metric_types[kind](name=f"kvkeep_{name}", documentation=text, labelnames=labelnames)
                self._metrics[name] = create_metric_per_engine(metric, per_engine_labelvalues)
        self._by_tier = {
            name: metric_types[Counter](name=f"kvkeep_{name}", documentation=text, labelnames=[*labelnames, "tier"])
            for name, text in TIER_COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Enters an engine's figures; ignores names that are not kvkeep's, and engines that vLLM did not announce."""
        for key, amount in transfer_stats_data.items():
            name, _, tier = key.partition(":")
            metric = self._metric(name, tier, engine_idx)
            if metric is None:
                continue
            if name in GAUGES:
                metric.set(amount)
            elif amount > 0:
                metric.inc(amount)

    def _metric(self, name: str, tier: str, engine_idx: int) -> Any:
        if not tier:
            return self._metrics.get(name, {}).get(engine_idx)
        if name not in self._by_tier or engine_idx not in self._labels:
            return None
        return self._by_tier[name].labels(*self._labels[engine_idx], tier)


def _forget_earlier() -> None:
    """Removes the figures of an earlier engine of this process from the registry, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith("kvkeep_"):
            REGISTRY.unregister(collector)
