"""Over one disk: the same weights under another configuration, and an engine with a drafter that is not kept."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = pytest.mark.vllm

EPS = {"rms_norm_eps": 0.3}
DRAFTER = {"method": "draft_model", "num_speculative_tokens": 3}
STEPS = ("whole cold", "whole warm", "extension", "two at once cold", "two at once warm")


@pytest.fixture(scope="module")
def engines(runs, job, model_folder, tmp_path_factory):
    """One folder's engines: with a drafter, as it is, twice, with an override, with config.json edited; a reference."""
    folder = tmp_path_factory.mktemp("configured") / "model"
    shutil.copytree(model_folder("tiny"), folder)

    def run(name: str, keep: bool = True, **options):
        disk = "configured" if keep else ""
        asked = job("one_prompt", keep={} if keep else None, options=options, disk=disk)
        return runs.run(f"configured-{name}", asked, folder)

    found = {"drafter": run("drafter", speculative_config={**DRAFTER, "model": str(folder)})}
    found |= {"first": run("first"), "again": run("again"), "override": run("override", hf_overrides=EPS)}
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **EPS}))
    return found | {"edited": run("edited"), "plain": run("plain", keep=False)}


def test_the_same_configuration_is_found_again(engines):
    assert engines["first"].external("whole cold") == 0
    assert engines["again"].external("whole cold") == 1024


def test_another_configuration_of_the_same_weights_finds_nothing(engines):
    override, plain = engines["override"], engines["plain"]
    assert engines["first"].answers("whole cold")[0]["tokens"] != plain.answers("whole cold")[0]["tokens"]
    assert override.external("whole cold") == override.external("two at once cold") == 0
    for step in STEPS:
        assert override.answers(step) == plain.answers(step), step


def test_an_edited_file_is_the_configuration_that_it_says(engines):
    """It finds what the override stored, which is the same, and nothing of before the edit."""
    edited, plain = engines["edited"], engines["plain"]
    assert edited.external("whole cold") == 1024
    for step in STEPS:
        theirs = plain.answers(step)
        assert [one["tokens"] for one in edited.answers(step)] == [one["tokens"] for one in theirs], step


def test_the_log_names_the_setting_that_tells_them_apart(engines):
    assert "rms_norm_eps: 0.3 here, 1e-05 there" in (engines["override"].folder / "log").read_text()


def test_with_a_drafter_that_has_a_cache_nothing_is_kept_and_the_log_says_why(engines):
    drafter = engines["drafter"]
    assert 'speculative decoding by "draft_model"' in drafter.facts["refusal"]
    assert 'nothing is kept: speculative decoding by "draft_model"' in (drafter.folder / "log").read_text()
    assert drafter.metric("external_prefix_cache_hits") == 0
    for step in STEPS:
        ours, first = drafter.answers(step), engines["first"].answers(step)
        assert [one["tokens"] for one in ours] == [one["tokens"] for one in first], step
