"""Where copies run, how they are made, and what is seen of them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from kvkeep.engine.copies.mode import LEAST_NBYTES, TRIALS, CopyMode
from kvkeep.engine.copies.thread import ThreadCopier, spare_cores
from kvkeep.errors import CopyFailed
from kvkeep.trace import Trace

LIMIT_S = 10.0


def test_copies_run_in_their_order_beside_the_caller() -> None:
    copier, order, go = ThreadCopier(), [], threading.Event()
    jobs = [copier.submit(lambda: go.wait(LIMIT_S)), *(copier.submit(lambda n=n: order.append(n)) for n in range(20))]
    assert not any(job.done() for job in jobs)
    go.set()
    jobs[-1].result(LIMIT_S)
    assert order == list(range(20))
    copier.close()


def test_what_a_step_waits_for_comes_before_what_no_step_waits_for() -> None:
    copier, order, go = ThreadCopier(), [], threading.Event()
    copier.submit(lambda: go.wait(LIMIT_S), background=True)
    jobs = [copier.submit(lambda n=n: order.append(n), background=n < 3) for n in range(6)]
    go.set()
    for job in jobs:
        job.result(LIMIT_S)
    assert order == [3, 4, 5, 0, 1, 2]
    copier.close()


def test_what_was_submitted_before_the_end_is_still_copied() -> None:
    copier, go = ThreadCopier(), threading.Event()
    jobs = [copier.submit(lambda: go.wait(LIMIT_S), beside) for beside in (False, True, False)]
    copier.close()
    go.set()
    assert [job.result(LIMIT_S) for job in jobs] == [True] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_bug_every_copy_fails_and_nobody_waits() -> None:
    before = set(threading.enumerate())
    copier = ThreadCopier()
    (thread,) = set(threading.enumerate()) - before
    jobs = [copier.submit(lambda: 1 // 0), copier.submit(lambda: 1)]
    for job in jobs:
        with pytest.raises(CopyFailed):
            job.result(LIMIT_S)
    with pytest.raises(CopyFailed):
        copier.submit(lambda: 1).result(LIMIT_S)
    thread.join(LIMIT_S)


def test_a_thread_that_is_bound_to_one_core_leaves_the_others() -> None:
    given = os.sched_getaffinity(0)
    if len(given) < 2:
        pytest.skip("this process has one core")
    found: list[frozenset[int]] = []

    def bound() -> None:
        os.sched_setaffinity(0, {min(given)})
        found.append(spare_cores())

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join(LIMIT_S)
    assert found == [frozenset(given - {min(given)})]


def test_what_is_set_is_done() -> None:
    assert not CopyMode("bulk", possible=True).layerwise()
    assert CopyMode("layerwise", possible=False).layerwise()
    assert not CopyMode("auto", possible=False).layerwise()


@pytest.mark.parametrize("faster", [False, True])
def test_auto_tries_both_and_takes_the_faster(faster: bool) -> None:
    choice, tried = CopyMode("auto", possible=True), []
    for _ in range(2 * TRIALS):
        tried.append(choice.layerwise())
        choice.took(tried[-1], 1.0 if tried[-1] is faster else 2.0, LEAST_NBYTES)
    assert tried.count(True) == TRIALS
    assert [choice.layerwise() for _ in range(10)] == [faster] * 10


def test_small_steps_say_nothing() -> None:
    choice = CopyMode("auto", possible=True)
    for _ in range(100):
        choice.took(choice.layerwise(), 1.0, LEAST_NBYTES - 1)
        assert not choice.layerwise()


def test_a_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "trace.json"))
    trace.span("load layer 1", "copies", 2.0, 2.5)
    trace.span("compute layer 0", "engine", 2.25, 3.0)
    trace.write(100.0)
    (file,) = tmp_path.iterdir()
    assert file.name == f"trace.{os.getpid()}.json"
    events = json.loads(file.read_text())["traceEvents"]
    assert [(one["name"], one["ts"], one["dur"]) for one in events if one["ph"] == "X"] == [
        ("load layer 1", 2e6, 0.5e6),
        ("compute layer 0", 2.25e6, 0.75e6),
    ]
    assert {one["args"]["name"]: one["tid"] for one in events if one["ph"] == "M"} == {"copies": 0, "engine": 1}


def test_a_trace_is_written_now_and_then_and_without_a_path_never(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "trace.json"))
    for now_s, names in ((100.0, ["a"]), (100.5, ["a"]), (103.0, ["a", "a", "a"])):
        trace.span("a", "copies", now_s, now_s)
        trace.write(now_s)
        (file,) = tmp_path.iterdir()
        assert [one["name"] for one in json.loads(file.read_text())["traceEvents"] if one["ph"] == "X"] == names
    Trace().write(1000.0, at_once=True)
    assert len(list(tmp_path.iterdir())) == 1
