"""What the planner's and the workers' halves send each other, in the envelopes that vLLM 0.32 carries.

Data only.
"""

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
    """A step's plan on its way to the workers; `expected` has what they must have loaded for the requests it names."""

    plan: StepPlan = field(default_factory=StepPlan)
    expected: dict[str, Expected] = field(default_factory=dict)


@dataclass
class ReportMeta(KVConnectorWorkerMetadata):
    """The workers' reports, and the adapters that they have loaded, on their way to the planner."""

    report: Report = field(default_factory=Report)
    loads: list[LoadedAdapter] = field(default_factory=list)
    resident: list[Resident] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both workers' reports as one."""
        assert isinstance(other, ReportMeta)
        return ReportMeta(self.report.merged(other.report), self.loads + other.loads, self.resident + other.resident)


@dataclass
class RankMeta(KVConnectorHandshakeMetadata):
    """What a worker publishes before the planner exists."""

    info: RankInfo
