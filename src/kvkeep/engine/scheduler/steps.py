"""Steps under way: what each step copies, which ranks have reported it, and what to do once all have.

A step in which any rank failed a load is tainted, and so is every step planned before the failure was known: the
forward ran on garbage, so nothing of it may become readable. Knows nothing about the store or the engine's calls.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StoresDone
from kvkeep.engine.scheduler.ops import rewind
from kvkeep.engine.scheduler.request import OpenChunk, RequestRecord
from kvkeep.telemetry import Figures
from kvkeep.wire.messages import StoreLease


@dataclass(frozen=True)
class Load:
    """A request's load of the tokens in `span`: the leases on its chunks, and an op and a digest for each of them.

    `blocks` are those that hold garbage if it fails. `beside`: no step waits for it, so that none depends on it.
    """

    leases: tuple[StoreLease, ...]
    span: tuple[int, int]
    ops: tuple[LoadOp, ...]
    digests: tuple[bytes, ...]
    _: KW_ONLY
    blocks: tuple[int, ...] = ()
    beside: bool = False


class Gather(NamedTuple):
    """One gather under way; `rewinds` are those of its chunk by then: after another rewind the gather is void."""

    record: RequestRecord
    chunk: OpenChunk
    seal: bool
    rewinds: int


class Sealed(NamedTuple):
    """A chunk whose every range has been gathered and summed by every rank."""

    record: RequestRecord
    chunk: OpenChunk
    sums: bytes


@dataclass
class Step:
    """One step under way, or (`beside`) one load that no step waits for.

    `loads` has each load with the index of its first op in the plan, `gathers` each store op in the plan's order.
    """

    number: int
    _: KW_ONLY
    loads: list[tuple[RequestRecord, Load, int]] = field(default_factory=list)
    gathers: list[Gather] = field(default_factory=list)
    beside: bool = False
    tainted: bool = False
    loads_missing: set[int] = field(default_factory=set)
    stores_missing: set[int] = field(default_factory=set)
    sums: dict[int, dict[int, bytes]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def add_load(self, record: RequestRecord, load: Load, first_op: int) -> None:
        """Adds a load whose first op in the plan has this index."""
        self.loads.append((record, load, first_op))

    def add_gather(self, record: RequestRecord, chunk: OpenChunk, seal: bool) -> None:
        """Adds the plan's next store op."""
        self.gathers.append(Gather(record, chunk, seal, chunk.rewinds))

    @property
    def records(self) -> list[RequestRecord]:
        """The request of each load and gather."""
        return [record for record, _, _ in self.loads] + [gather.record for gather in self.gathers]


@dataclass
class Done:
    """What to do after a report: chunks to commit, leases to release, requests of which fewer copies are under way.

    `failed_chunks` are the lease and digest of each chunk whose load failed; `failed_early` counts those that were
    promised while they were read. `failed_loads` are the requests whose load within a step failed, each with the blocks
    that hold garbage now.
    """

    sealed: list[Sealed] = field(default_factory=list)
    failed_chunks: list[tuple[StoreLease, bytes]] = field(default_factory=list)
    failed_early: int = 0
    failed_loads: list[tuple[RequestRecord, frozenset[int]]] = field(default_factory=list)
    leases: list[StoreLease] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)


class Steps:
    """All steps under way of an engine with `ranks` workers."""

    def __init__(self, ranks: int, figures: Figures) -> None:
        self._ranks = ranks
        self._figures = figures
        self._last = 0
        self._under_way: OrderedDict[int, Step] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self._under_way)

    def begin(self, beside: bool = False) -> Step:
        """A new step, not yet under way."""
        self._last += 1
        return Step(self._last, beside=beside)

    def launch(self, step: Step) -> None:
        """Puts a step under way, whose plan is out; one without copies needs no report."""
        everyone = set(range(self._ranks))
        step.loads_missing = set(everyone) if step.loads else set()
        step.stores_missing = set(everyone) if step.gathers else set()
        for record in step.records:
            record.steps += 1
        if step.loads_missing or step.stores_missing:
            self._under_way[step.number] = step

    def taint(self) -> None:
        """Forbids that anything of any step under way becomes readable."""
        for step in self._under_way.values():
            step.tainted = True

    def take(self, report: Report) -> Done:
        """Takes in what ranks have finished, and finishes complete steps in their order."""
        done = Done()
        for loads in report.loads:
            self._enter_loads(loads)
        for stores in report.stores:
            self._enter_stores(stores)
        for step in list(self._under_way.values()):
            if step.loads and not step.loads_missing:
                self._finish_loads(step, done)
            if not step.loads_missing and not step.stores_missing:
                del self._under_way[step.number]
                self._finish_stores(step, done)
        return done

    def _enter_loads(self, loads: LoadsDone) -> None:
        step = self._under_way.get(loads.step)
        if step is None:
            return
        step.loads_missing.discard(loads.rank)
        step.failed.update(loads.failed)
        if loads.failed and not step.beside:
            self.taint()

    def _enter_stores(self, stores: StoresDone) -> None:
        step = self._under_way.get(stores.step)
        if step is None:
            return
        step.stores_missing.discard(stores.rank)
        step.sums[stores.rank] = stores.sums

    def _finish_loads(self, step: Step, done: Done) -> None:
        loads, step.loads = step.loads, []
        for record, load, first_op in loads:
            record.steps -= 1
            done.records.append(record)
            done.leases += load.leases
            failed = [index for index in range(len(load.ops)) if first_op + index in step.failed]
            start, end = load.span
            lost = end - load.ops[failed[0]].start if failed else 0
            self._figures.add("failed_tokens", lost)
            self._figures.add("delivered_tokens", end - start - lost)
            if failed:
                # a chunk that was still being read may come yet; if it is bad its tier has dropped it
                early = [index for index in failed if load.ops[index].progress_at]
                if record.keeps:  # else its adapter has changed, so that its loads fail whatever the chunk is
                    done.failed_chunks += [
                        (load.leases[0], load.digests[index]) for index in failed if index not in early
                    ]
                done.failed_early += len(early)
                done.failed_loads.append((record, frozenset(load.blocks)))

    def _finish_stores(self, step: Step, done: Done) -> None:
        for index, (record, chunk, seal, rewinds) in enumerate(step.gathers):
            record.steps -= 1
            done.records.append(record)
            parts = [self._part(step, rank, index) for rank in range(self._ranks)]
            if chunk.rewinds != rewinds:  # steps fill it again, and this gather was of its old blocks
                self._figures.add("dropped_chunks")
            elif step.tainted or None in parts:
                self._figures.add("dropped_chunks")
                rewind(chunk)
            elif seal:
                done.sealed.append(Sealed(record, chunk, b"".join(part or b"" for part in parts)))

    def _part(self, step: Step, rank: int, index: int) -> bytes | None:
        return step.sums.get(rank, {}).get(index)
