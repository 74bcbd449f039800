"""kvkeep's figures in vLLM's own log and /metrics.

Knows nothing about what the figures mean: it carries what the planner counted, as differences since the last time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from kvkeep.telemetry import COUNTERS, GAUGES, Miss

MISSES = {f"miss_{why.name.lower()}": why.value for why in Miss}


@dataclass
class KVKeepStats(KVConnectorStats):
    """Counters since the last time and gauges as they are; `data` is {name: number}."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval's counters; its gauges replace ours."""
        merged = dict(self.data)
        for name, number in other.data.items():
            merged[name] = number if name in GAUGES else merged.get(name, 0) + number
        return KVKeepStats(merged)

    def reduce(self) -> dict[str, int | float]:
        """What the log shows: everything that is not zero."""
        return {name: number for name, number in self.data.items() if number}

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not any(self.data.values())


class Differences:
    """Turns the planner's running totals into what is new since the last look."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def since_last(self, totals: dict[str, int]) -> KVKeepStats | None:
        """The new amounts; None if nothing has changed."""
        if totals == self._last:
            return None
        data = {name: total if name in GAUGES else total - self._last.get(name, 0) for name, total in totals.items()}
        self._last = totals
        return KVKeepStats(data)


class KVKeepPromMetrics(KVConnectorPromMetrics):
    """One Prometheus metric a figure, named kvkeep_*, with vLLM's own labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier()
        self._metrics: dict[str, dict[int, Any]] = {}
        for names, kind in ((COUNTERS, Counter), (MISSES, Counter), (GAUGES, Gauge)):
            for name, text in names.items():
                metric = metric_types[kind](name=f"kvkeep_{name}", documentation=text, labelnames=labelnames)
                self._metrics[name] = create_metric_per_engine(metric, per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Enters one engine's figures; a name that is not ours is left alone."""
        for name, number in transfer_stats_data.items():
            metric = self._metrics.get(name, {}).get(engine_idx)
            if metric is None:
                continue
            if name in GAUGES:
                metric.set(number)
            elif number > 0:
                metric.inc(number)


def _forget_earlier() -> None:
    """Takes the figures of an earlier engine of this process out of the registry, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith("kvkeep_"):
            REGISTRY.unregister(collector)
