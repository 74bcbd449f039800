"""What the scheduler's and the workers' instances of the connector send each other: data, which vLLM 0.32 carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvkeep.doors.vllm.loaded import Expected, LoadedAdapter, Resident
from kvkeep.engine.plan import RankInfo, Report, StepPlan


@dataclass
class PlanMeta(KVConnectorMetadata):
    """A step's plan for the workers; `expected`: by request, the adapter that they must have loaded."""

    plan: StepPlan = field(default_factory=StepPlan)
    expected: dict[str, Expected] = field(default_factory=dict)


@dataclass
class ReportMeta(KVConnectorWorkerMetadata):
    """Workers' reports for the planner, and the adapters that they have loaded."""

    report: Report = field(default_factory=Report)
    loads: list[LoadedAdapter] = field(default_factory=list)
    resident: list[Resident] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge two workers' reports."""
        if not isinstance(other, ReportMeta):
            raise TypeError(f"a report is merged with reports, not with {type(other).__name__}")
        return ReportMeta(self.report.merged(other.report), self.loads + other.loads, self.resident + other.resident)


@dataclass
class RankMeta(KVConnectorHandshakeMetadata):
    """What a worker says of itself before the planner exists."""

    info: RankInfo
