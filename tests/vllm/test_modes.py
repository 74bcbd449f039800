"""The same answers however copies are made: beside the steps, layer by layer, both at once with few blocks."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.vllm

LAST_PLACES = 1e-5  # as in test_answers.py
STEPS = ("whole", "255", "256", "257", "1023", "1024", "1025", "two at once")
REUSED = {"whole": 512, "255": 0, "256": 255, "257": 256, "1023": 768, "1024": 1023, "1025": 1024}


def check_same(runs, name, reference, *steps):
    for step in steps:
        for ours, theirs in zip(runs(name).answers(step), runs(reference).answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"], step
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=0, abs=LAST_PLACES), step


@pytest.mark.parametrize("name", ["async", "layerwise"])
def test_every_answer_is_the_reference(runs, name):
    check_same(runs, name, "tiny-plain", *(f"{step} {how}" for step in STEPS for how in ("cold", "warm")))
    check_same(runs, name, "tiny-plain", "prefix", "extension", "salt a again", "after the reset warm")


@pytest.mark.parametrize("name", ["async", "layerwise"])
def test_as_much_is_reused_as_in_bulk(runs, name):
    assert {step: runs(name).external(f"{step} warm") for step in REUSED} == REUSED


def test_two_requests_that_are_loaded_beside_the_steps_are_both_loaded(runs):
    step = runs("async").step("two at once warm")
    assert (step["external"], step["local"]) == (1024, 0)  # nothing of a load is in vLLM's cache before it is over


def test_with_few_blocks_requests_are_preempted_aborted_and_loaded_again(runs):
    keep = runs("tight-async")
    assert keep.metric("num_preemptions") > 0
    assert keep.figure("claimed_after_preemption_tokens") > 0
    check_same(runs, "tight-async", "tight-plain", "chunked warm", "after the abort", "crowd cold", "crowd warm")


def test_a_trace_shows_layers_leaving_while_the_engine_computes(runs):
    keep = runs("layerwise")
    (file,) = keep.folder.glob("trace.*.json")
    events = [one for one in json.loads(file.read_text())["traceEvents"] if one["ph"] == "X"]
    names = {one["name"] for one in events}
    assert {"load layer 0", "load layer 1", "store layer 0", "store layer 1"} <= names
    stores = [one for one in events if one["name"].startswith("store layer")]
    runs_then = [one for one in events if one["name"].startswith("compute layer")]
    assert any(overlap(one, other) for one in stores for other in runs_then)


def test_a_trace_shows_a_layer_arriving_while_the_one_before_it_is_computed(script_run):
    found = script_run("overlap.py", "kvkeep", 1)
    assert found["warm"] == found["cold"]
    assert found["figures"]["delivered_tokens"] == 512
    loads = [one for one in found["spans"] if one["name"] == "load layer 1"]
    before = [one for one in found["spans"] if one["name"] == "compute layer 0"]
    assert loads
    assert all(any(overlap(one, other) for other in before) for one in loads)


def overlap(one, other):
    return one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"]
