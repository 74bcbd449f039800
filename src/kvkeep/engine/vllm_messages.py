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

from kvkeep.engine.plan import RankInfo, Report, StepPlan


@dataclass
class PlanMeta(KVConnectorMetadata):
    """A step's plan on its way to the workers."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class ReportMeta(KVConnectorWorkerMetadata):
    """The workers' reports on their way to the planner."""

    report: Report = field(default_factory=Report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both workers' reports as one."""
        assert isinstance(other, ReportMeta)
        return ReportMeta(self.report.merged(other.report))


@dataclass
class RankMeta(KVConnectorHandshakeMetadata):
    """What a worker publishes before the planner exists."""

    info: RankInfo
