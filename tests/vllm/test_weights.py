"""A shared store outlives its engines, and tells apart models whose weights differ at the same path."""

from __future__ import annotations

import shutil

import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def replaced(runs, job, model_folder, tmp_path_factory):
    """One folder's engines: with its first weights, with others, with the first again; and the others' reference."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    shutil.copytree(model_folder("tiny"), folder)
    weights = folder / "model.safetensors"
    first = weights.read_bytes()
    found = {"first": runs.run("weights-first", job("one_prompt", keep={}, store="weights"), folder)}
    others = {name: tensor * 1.25 for name, tensor in load_file(weights).items()}
    save_file(others, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == len(first)
    found["others"] = runs.run("weights-others", job("one_prompt", keep={}, store="weights"), folder)
    found["plain"] = runs.run("weights-others-plain", job("one_prompt"), folder)
    weights.write_bytes(first)
    found["first plain"] = runs.run("weights-first-plain", job("one_prompt"), folder)
    found["again"] = runs.run("weights-again", job("one_prompt", keep={}, store="weights"), folder)
    return found


STEPS = ("whole cold", "whole warm", "extension", "two at once cold", "two at once warm")


def test_replaced_weights_find_nothing_of_the_old_ones(replaced):
    assert replaced["first"].answers("whole cold")[0]["tokens"] != replaced["others"].answers("whole cold")[0]["tokens"]
    assert [replaced["others"].external(step) for step in STEPS[:4]] == [0, 1024, 1024, 0]
    assert replaced["others"].reused("two at once warm") == 1024
    for step in STEPS[:4]:
        assert replaced["others"].answers(step) == replaced["plain"].answers(step)
    ours, theirs = (replaced[name].answers(STEPS[4]) for name in ("others", "plain"))  # in other batches
    assert [one["tokens"] for one in ours] == [one["tokens"] for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_a_new_engine_finds_what_an_older_one_with_the_same_weights_stored(replaced):
    again, reference = replaced["again"], replaced["first plain"]
    assert [again.external(step) for step in STEPS[:3]] == [1024, 1024, 1024]
    assert [again.reused(step) for step in STEPS[3:]] == [1024, 1024]
    for step in STEPS:
        theirs = reference.answers(step)
        assert [one["tokens"] for one in again.answers(step)] == [one["tokens"] for one in theirs]
    assert again.answers("whole cold") == reference.answers("whole warm")  # the same recompute: to the bit


@pytest.mark.parametrize("name", ["first", "others", "again"])
def test_each_engine_leaves_the_shared_store_as_it_should_be(replaced, name):
    facts = replaced[name]
    assert facts.figure("claimed_first_tokens") == facts.metric("external_prefix_cache_hits")
    assert facts.stats["problem"] == ""
    held = ("pinned_nbytes", "writing_nbytes", "dead_nbytes", "quarantined_nbytes")
    assert [facts.stats[one] for one in held] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def overtaken(runs, job, model_folder, tmp_path_factory):
    """An engine whose weight file is replaced right after it was read; two with the new one, over the same disk."""
    folder = tmp_path_factory.mktemp("overtaken") / "model"
    shutil.copytree(model_folder("tiny"), folder)
    weights = folder / "model.safetensors"
    others = folder.parent / "others"
    save_file({name: tensor * 1.25 for name, tensor in load_file(weights).items()}, others, metadata={"format": "pt"})
    replaced = job("few", keep={}, disk="overtaken", env={"OVERTAKEN_BY": str(others)})
    found = {"overtaken": runs.run("overtaken", replaced, folder)}
    assert weights.read_bytes() == others.read_bytes()
    for name in ("next", "after next"):
        found[name] = runs.run(f"overtaken-{name}", job("few", keep={}, disk="overtaken"), folder)
    found["plain"] = runs.run("overtaken-plain", job("few"), folder)
    return found


def test_weights_replaced_while_an_engine_starts_are_not_taken_for_those_that_it_loaded(overtaken):
    right = overtaken["plain"].answers("whole cold")[0]["tokens"]
    assert overtaken["overtaken"].answers("whole cold")[0]["tokens"] != right, "the others answer the same"
    assert overtaken["next"].answers("whole cold")[0]["tokens"] == right
    assert overtaken["after next"].answers("whole cold")[0]["tokens"] == right
    assert [overtaken[name].external("whole cold") for name in ("overtaken", "next", "after next")] == [0, 0, 512]
    assert "changed after this engine had begun to start" in (overtaken["overtaken"].folder / "log").read_text()


@pytest.fixture(scope="module")
def changed(runs, job, model_folder):
    """An engine whose weights are changed where they lie, with kvkeep as it comes; and the reference."""
    keep = {"local_reset": "forget"}
    return {
        "keep": runs.run("changed", job("changed_weights", keep=keep, disk="changed"), model_folder("tiny")),
        "plain": runs.run("changed-plain", job("changed_weights"), model_folder("tiny")),
    }


def test_weights_changed_in_place_find_nothing_of_before_once_vllms_own_cache_is_emptied(changed):
    keep, plain = changed["keep"], changed["plain"]
    tokens = {name: plain.answers(name)[0]["tokens"] for name in ("before cold", "changed cold")}
    assert tokens["before cold"] != tokens["changed cold"], "the change changes nothing: it tests nothing"
    for step in ("before cold", "before warm", "changed cold", "changed warm"):
        assert keep.answers(step)[0]["tokens"] == plain.answers(step)[0]["tokens"], step
        assert keep.external(step) == 0, step
