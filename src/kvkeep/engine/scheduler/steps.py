"""Steps under way: what each planned, which ranks have reported it, and what follows from a whole report.

Knows nothing about the store or the engine's calls. A step in which any rank failed a load is tainted, and so is every
step that was planned before the failure was known: the forward ran on garbage, nothing of it may become readable.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StoresDone
from kvkeep.engine.scheduler.ops import rewind
from kvkeep.engine.scheduler.request import OpenChunk, Record
from kvkeep.telemetry import Figures


@dataclass(frozen=True)
class Load:
    """A request's load of the tokens in `span`: its leases, one op and digest a chunk, the blocks that depend on it.

    `beside`: no step waits for it, so that nothing depends on it before it has arrived.
    """

    boot: bytes
    leases: tuple[int, ...]
    span: tuple[int, int]
    ops: tuple[LoadOp, ...]
    digests: tuple[bytes, ...]
    blocks: tuple[int, ...]
    beside: bool = False


class Gather(NamedTuple):
    """One store op under way; `rewinds` are those that its chunk had by then: after another one it is void."""

    record: Record
    chunk: OpenChunk
    seal: bool
    rewinds: int


class Sealed(NamedTuple):
    """A chunk whose every range has been gathered and summed by every rank."""

    record: Record
    chunk: OpenChunk
    sums: bytes


@dataclass
class Step:
    """One step under way, or (`beside`) one load that no step waits for.

    `gathers` has each store op, in the plan's order.
    """

    number: int
    loads: list[tuple[Record, Load, int]] = field(default_factory=list)
    gathers: list[Gather] = field(default_factory=list)
    beside: bool = False
    tainted: bool = False
    loads_missing: set[int] = field(default_factory=set)
    stores_missing: set[int] = field(default_factory=set)
    sums: dict[int, dict[int, bytes]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def add_load(self, record: Record, load: Load, place: int) -> None:
        """Remembers a load whose first op is at `place` of the plan."""
        self.loads.append((record, load, place))

    def add_gather(self, record: Record, chunk: OpenChunk, seal: bool) -> None:
        """Remembers the plan's next store op."""
        self.gathers.append(Gather(record, chunk, seal, chunk.rewinds))

    @property
    def records(self) -> list[Record]:
        """Every request that the step names, once for each time."""
        return [record for record, _, _ in self.loads] + [gather.record for gather in self.gathers]


@dataclass
class Done:
    """What follows from a report; `failed_early` chunks failed that were promised while they were read.

    `failed_loads` are the requests whose load within a step failed, each with the blocks that depend on it.
    """

    sealed: list[Sealed] = field(default_factory=list)
    failed_chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    failed_early: int = 0
    failed_loads: list[tuple[Record, frozenset[int]]] = field(default_factory=list)
    leases: list[tuple[bytes, int]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def failed_digests(self, boot: bytes) -> list[bytes]:
        """The chunks of this start of the store whose load failed.

        Of another start a load fails for want of its pool, which says nothing about the chunk.
        """
        return [digest for one, digest in self.failed_chunks if one == boot]

    def read_leases(self, boot: bytes) -> list[int]:
        """The finished loads' leases that belong to this start of the store."""
        return [lease for one, lease in self.leases if one == boot]


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
        """The step's plan is out; one without copies needs no report."""
        everyone = set(range(self._ranks))
        step.loads_missing = set(everyone) if step.loads else set()
        step.stores_missing = set(everyone) if step.gathers else set()
        for record in step.records:
            record.steps += 1
        if step.loads_missing or step.stores_missing:
            self._under_way[step.number] = step

    def taint(self) -> None:
        """Nothing of any step under way may become readable."""
        for step in self._under_way.values():
            step.tainted = True

    def take(self, report: Report) -> Done:
        """Enters what ranks have finished; steps that are complete are finished in their order."""
        done = Done()
        for loads in report.loads:
            self._enter_loads(loads)
        for stores in report.stores:
            self._enter_stores(stores)
        for number, step in list(self._under_way.items()):
            if step.loads and not step.loads_missing:
                self._finish_loads(step, done)
            if not step.loads_missing and not step.stores_missing:
                del self._under_way[number]
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
        for record, load, place in loads:
            record.steps -= 1
            done.records.append(record)
            done.leases += [(load.boot, lease) for lease in load.leases]
            failed = [number for number in range(len(load.ops)) if place + number in step.failed]
            start, end = load.span
            lost = end - load.ops[failed[0]].start if failed else 0
            self._figures.add("failed_tokens", lost)
            self._figures.add("delivered_tokens", end - start - lost)
            if failed:
                # what was still being read may come yet; if it is bad its tier has dropped it
                early = [number for number in failed if load.ops[number].word]
                if record.keeps:  # else its adapter is another by now, which makes a load fail whatever the chunk is
                    done.failed_chunks += [
                        (load.boot, load.digests[number]) for number in failed if number not in early
                    ]
                done.failed_early += len(early)
                done.failed_loads.append((record, frozenset(load.blocks)))

    def _finish_stores(self, step: Step, done: Done) -> None:
        for place, (record, chunk, seal, rewinds) in enumerate(step.gathers):
            record.steps -= 1
            done.records.append(record)
            parts = [self._part(step, rank, place) for rank in range(self._ranks)]
            if chunk.rewinds != rewinds:  # it is being filled again, and this would have been of its old blocks
                self._figures.add("dropped_chunks")
            elif step.tainted or None in parts:
                self._figures.add("dropped_chunks")
                rewind(chunk)
            elif seal:
                done.sealed.append(Sealed(record, chunk, b"".join(part or b"" for part in parts)))

    def _part(self, step: Step, rank: int, place: int) -> bytes | None:
        return step.sums.get(rank, {}).get(place)
