"""What is worth waiting for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.engine.scheduler.estimate import LEAST_TOKENS, TRY_EVERY, Estimate, Paces
from kvkeep.testing.doubles.transfers import ManualClock

CHUNK_NBYTES = 1000


def test_nothing_is_refused_before_anything_was_measured() -> None:
    assert Estimate().worth_s((0, 512), 10**12) is None


def test_few_tokens_say_nothing() -> None:
    estimate = Estimate()
    estimate.computed(0, LEAST_TOKENS - 1, 100.0)
    assert estimate.compute_s(0, 512) is None


@given(rate=st.floats(1e-6, 1.0), start=st.integers(0, 5000), length=st.integers(1, 5000))
def test_one_pace_everywhere_is_that_pace(rate: float, start: int, length: int) -> None:
    estimate = Estimate()
    estimate.computed(0, 4096, 4096 * rate)
    assert estimate.compute_s(start, start + length) == pytest.approx(length * rate)


def test_later_tokens_may_be_slower() -> None:
    estimate = Estimate()
    estimate.computed(0, 100, 1.0)
    estimate.computed(4096, 4196, 3.0)
    assert estimate.compute_s(0, 64) == pytest.approx(0.64)
    assert estimate.compute_s(4096, 4146) == pytest.approx(1.5)
    assert estimate.compute_s(1024, 1124) == pytest.approx(1.0), "the nearest earlier one"


def test_a_tier_is_waited_for_as_long_as_computing_takes() -> None:
    estimate = Estimate()
    estimate.computed(0, 1000, 10.0)
    assert estimate.worth_s((0, 500), CHUNK_NBYTES) == pytest.approx(5.0)
    estimate.read(CHUNK_NBYTES, CHUNK_NBYTES, 4.9)
    assert estimate.worth_s((0, 500), CHUNK_NBYTES) == pytest.approx(5.0)


def test_a_tier_that_is_slower_is_not_waited_for_but_tried_now_and_then() -> None:
    estimate = Estimate()
    estimate.computed(0, 1000, 10.0)
    estimate.read(0, CHUNK_NBYTES, 6.0)
    waits = [estimate.worth_s((0, 500), CHUNK_NBYTES) for _ in range(2 * TRY_EVERY)]
    assert [place for place, wait in enumerate(waits) if wait] == [TRY_EVERY - 1, 2 * TRY_EVERY - 1]
    for _ in range(20):
        estimate.read(CHUNK_NBYTES, CHUNK_NBYTES, 1.0)
    assert estimate.worth_s((0, 500), CHUNK_NBYTES) == pytest.approx(5.0), "it has become fast again"


def test_steps_that_overlap_are_not_counted_twice() -> None:
    clock, estimate = ManualClock(), Estimate()
    paces = Paces(estimate, clock)
    paces.begin([(0, 100)])
    clock.advance(1.0)
    paces.begin([(100, 200)])
    clock.advance(1.0)
    paces.end()
    clock.advance(1.0)
    paces.end()
    assert estimate.compute_s(0, 64) == pytest.approx(64 * 0.02)
    assert estimate.compute_s(128, 228) == pytest.approx(1.0)


def test_a_step_is_shared_out_by_tokens_and_one_that_says_nothing_is_left_out() -> None:
    clock, estimate = ManualClock(), Estimate()
    paces = Paces(estimate, clock)
    for spans in ([(0, 100), (5000, 5100)], []):
        paces.begin(spans)
        clock.advance(2.0)
        paces.end()
    paces.end()
    assert estimate.compute_s(0, 100) == pytest.approx(1.0)
    assert estimate.compute_s(5000, 5100) == pytest.approx(1.0)


def test_steps_with_few_tokens_are_the_pace_of_those_that_run() -> None:
    clock, paces = ManualClock(), None
    paces = Paces(Estimate(), clock)
    assert paces.step_s is None
    for spans, seconds in (([(0, 1000)], 9.0), ([(1000, 1001), (7, 8)], 0.5), ([], 9.0)):
        paces.begin(spans)
        clock.advance(seconds)
        paces.end()
    assert paces.step_s == pytest.approx(0.5)
