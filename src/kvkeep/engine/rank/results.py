"""The results of a rank's copies since they were last taken: for the planner, and for the engine.

Knows nothing about how copies are made, or about the engine's calls.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StoresDone

log = logging.getLogger("kvkeep")


@dataclass
class Results:
    """The planner's `report`, the engine's blocks whose load failed, and how requests' loads beside the steps ended."""

    report: Report = field(default_factory=Report)
    failed_blocks: set[int] = field(default_factory=set)
    loaded: dict[str, bool] = field(default_factory=dict)

    def loads_over(self, done: LoadsDone, ops: Sequence[LoadOp], request: str = "") -> None:
        """Adds loads that have ended, a step's or (`request`) those of one request beside the steps."""
        for index in done.failed:
            self.failed_blocks.update(int(block) for run in ops[index].blocks for block in run.block_ids)
        if request:
            self.loaded[request] = not done.failed
        if done.failed:
            log.warning("kvkeep: %d of %d chunks were not loaded: they are computed again", len(done.failed), len(ops))
        self.report.loads.append(done)

    def stores_over(self, done: StoresDone) -> None:
        """Adds a step's stores that have ended."""
        self.report.stores.append(done)

    def add(self, later: Results) -> None:
        """Adds results that came later."""
        self.report = self.report.merged(later.report)
        self.failed_blocks |= later.failed_blocks
        self.loaded |= later.loaded

    def take_report(self) -> Report:
        """The copies that have ended since the last call."""
        report, self.report = self.report, Report()
        return report

    def take_failed_blocks(self) -> set[int]:
        """The engine's blocks whose load failed since the last call."""
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def take_loaded(self) -> dict[str, bool]:
        """The requests whose loads beside the steps ended since the last call, and whether all of them arrived."""
        loaded, self.loaded = self.loaded, {}
        return loaded
