"""Steps under way: what is readable and what is not, for reports that come late, in pieces and in any order."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvkeep.core.key import Chain, none_hash
from kvkeep.engine.plan import LoadOp, LoadsDone, Report, StoresDone
from kvkeep.engine.scheduler.ops import rewind
from kvkeep.engine.scheduler.request import OpenChunk, RequestRecord
from kvkeep.engine.scheduler.steps import Done, Load, Steps
from kvkeep.telemetry import Figures
from kvkeep.wire.messages import StoreLease

BOOT = b"b" * 16


class Bench:
    """Steps of two ranks; `store` launches a step that seals one chunk, `load` one that loads two chunks and seals."""

    def __init__(self) -> None:
        self.figures = Figures()
        self.steps = Steps(2, self.figures)
        self.record = RequestRecord("r", Chain(8, none_hash()), 100)

    def step(self, number: int, load: bool = False) -> OpenChunk:
        step, chunk = self.steps.begin(), OpenChunk(number, StoreLease(BOOT, 7), 0, 0, next_slots=[2], sealed_in=number)
        assert step.number == number
        if load:
            ops = tuple(LoadOp(BOOT, "r", start, 0, blocks=()) for start in (0, 8))
            step.add_load(
                self.record,
                Load((StoreLease(BOOT, 70 + number),), (0, 15), ops, (b"first", b"second"), blocks=(1, 2, 3)),
                0,
            )
        step.add_gather(self.record, chunk, True)
        self.steps.launch(step)
        return chunk

    def take(self, *parts: LoadsDone | StoresDone) -> Done:
        loads = [one for one in parts if isinstance(one, LoadsDone)]
        return self.steps.take(Report(loads, [one for one in parts if isinstance(one, StoresDone)]))


def stored(step: int, rank: int) -> StoresDone:
    return StoresDone(step, rank, {0: bytes([rank]) * 16})


def test_a_chunk_is_sealed_by_the_last_rank_s_report_and_its_sums_are_in_the_ranks_order() -> None:
    bench = Bench()
    chunk = bench.step(1)
    assert bench.steps.busy
    assert bench.take(stored(1, 1)).sealed == []
    [sealed] = bench.take(stored(1, 0)).sealed
    assert (sealed.chunk, sealed.sums) == (chunk, bytes(16) + b"\1" * 16)
    assert not bench.steps.busy
    assert bench.record.steps == 0


def test_a_chunk_that_one_rank_has_not_gathered_is_filled_again() -> None:
    bench = Bench()
    chunk = bench.step(1)
    assert bench.take(stored(1, 0), StoresDone(1, 1, {})).sealed == []
    assert (chunk.sealed_in, chunk.next_slots) == (0, [0])
    assert bench.figures.count("dropped_chunks") == 1


PARTS = (LoadsDone(1, 0, ()), LoadsDone(1, 1, (1,)), stored(1, 0), stored(1, 1), stored(2, 0), stored(2, 1))


@pytest.mark.parametrize("whole", [False, True], ids=["one by one", "at once"])
def test_nothing_of_a_step_with_a_failed_load_nor_of_one_planned_before_that_was_known_is_sealed(whole: bool) -> None:
    # a rank runs its steps one after the other: its parts come in the plan's order, the ranks' in any
    for order in permutations(PARTS):
        by_rank = [[one for one in order if one.rank == rank] for rank in (0, 1)]
        if any(ones != [one for one in PARTS if one.rank == rank] for rank, ones in enumerate(by_rank)):
            continue
        bench = Bench()
        first, second = bench.step(1, load=True), bench.step(2)
        done = [bench.take(*order)] if whole else [bench.take(one) for one in order]
        assert [sealed.chunk for one in done for sealed in one.sealed] == []
        assert (first.sealed_in, second.sealed_in) == (0, 0)
        assert [failed for one in done for failed in one.failed_chunks] == [(StoreLease(BOOT, 71), b"second")]
        assert [load for one in done for load in one.failed_loads] == [(bench.record, {1, 2, 3})]
        assert [lease for one in done for lease in one.leases] == [StoreLease(BOOT, 71)]
        assert (bench.figures.count("failed_tokens"), bench.figures.count("delivered_tokens")) == (7, 8)
        assert not bench.steps.busy
        assert bench.record.steps == 0


def test_a_step_after_the_failure_is_known_is_sealed_again() -> None:
    bench = Bench()
    bench.step(1, load=True)
    bench.take(*(one for one in PARTS if one.step == 1))
    chunk = bench.step(2)
    assert [one.chunk for one in bench.take(stored(2, 0), stored(2, 1)).sealed] == [chunk]


def test_a_chunk_that_was_rewound_meanwhile_is_not_sealed() -> None:
    bench = Bench()
    chunk = bench.step(1)
    rewind(chunk)  # its request was preempted: its blocks have another content now
    assert bench.take(stored(1, 0), stored(1, 1)).sealed == []


def test_a_late_report_of_old_blocks_does_not_undo_the_gather_of_the_new_ones() -> None:
    bench = Bench()
    chunk = bench.step(1)
    rewind(chunk)
    again = bench.steps.begin()
    chunk.sealed_in = again.number
    again.add_gather(bench.record, chunk, True)
    bench.steps.launch(again)
    assert bench.take(stored(1, 0), stored(1, 1)).sealed == []
    assert [one.chunk for one in bench.take(stored(2, 0), stored(2, 1)).sealed] == [chunk]
    assert bench.figures.count("dropped_chunks") == 1


def test_a_load_that_is_over_gives_its_leases_to_be_released() -> None:
    bench = Bench()
    bench.step(1, load=True)
    done = bench.take(LoadsDone(1, 0, ()), LoadsDone(1, 1, ()))
    assert done.leases == [StoreLease(BOOT, 71)]
    assert bench.figures.count("delivered_tokens") == 15


def test_a_report_of_a_step_that_nobody_knows_changes_nothing() -> None:
    bench = Bench()
    bench.step(1)
    done = bench.take(stored(9, 0), LoadsDone(9, 0, (0,)))
    assert (done.sealed, done.failed_chunks, bench.steps.busy) == ([], [], True)
    assert len(bench.take(stored(1, 0), stored(1, 1)).sealed) == 1


def test_a_step_without_copies_awaits_nothing() -> None:
    steps = Steps(2, Figures())
    steps.launch(steps.begin())
    assert not steps.busy


def test_a_step_that_only_loads_ends_with_the_last_rank_s_loads() -> None:
    bench = Bench()
    step = bench.steps.begin()
    step.add_load(
        bench.record,
        Load((StoreLease(BOOT, 71),), (0, 8), (LoadOp(BOOT, "r", 0, 0, blocks=()),), (b"first",), blocks=(1,)),
        0,
    )
    bench.steps.launch(step)
    assert bench.take(LoadsDone(1, 0, ())).leases == []
    assert bench.steps.busy
    assert bench.take(LoadsDone(1, 1, ())).leases == [StoreLease(BOOT, 71)]
    assert not bench.steps.busy
