"""A prefix on disk that is promised before it is read: the same answers, also where a record is bad."""

from __future__ import annotations

import os
import shutil

import pytest

from kvkeep.testing.doubles.faulty_files import flip_bit, record_paths

pytestmark = pytest.mark.vllm

LAST_PLACES = 1e-5  # as in test_answers.py
STEPS = (*(f"prefix {number}" for number in range(6)), "two at once", "two again")


def check_same(facts, reference):
    for step in STEPS:
        for ours, theirs in zip(facts.answers(step), reference.answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"], step
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=0, abs=LAST_PLACES), step


def test_every_answer_is_the_reference_and_came_from_disk_while_its_step_ran(runs):
    keep = runs("early")
    check_same(keep, runs("early-plain"))
    assert [keep.external(f"prefix {number}") for number in range(6)] == [1024] * 6
    assert keep.external("two at once") == 1023 + 768
    assert keep.figure("early_chunks") >= 4 * 5, "all but the first one, which was measured"
    assert keep.figure("early_failed_chunks") == keep.figure("failed_tokens") == 0
    assert keep.figure("disk_fetched_chunks") == 4 * 6 + 4 + 3


def test_bad_records_are_computed_again_and_nothing_of_their_step_is_kept(runs, job, model_folder):
    runs("early-disk")
    shutil.copytree(runs.folder / "for-early", runs.folder / "for-early-bad")
    bad = sorted(record_paths(str(runs.folder / "for-early-bad")))[::5]
    for path in bad:
        flip_bit(path, 8 * (os.path.getsize(path) - 100))  # in its last layer
    one = job("prefixes", keep=runs("early").job.keep, disk="for-early-bad")
    keep = runs.run("early-bad", one, model_folder("tiny"))
    check_same(keep, runs("early-plain"))
    assert keep.figure("early_failed_chunks") > 0
    assert keep.figure("failed_tokens") > 0
    claimed = keep.figure("claimed_first_tokens") + keep.figure("claimed_after_preemption_tokens")
    assert claimed == keep.figure("delivered_tokens") + keep.figure("failed_tokens")
