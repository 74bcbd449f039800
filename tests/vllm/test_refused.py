"""A model that cannot be kept is refused with the reason; the engine runs without kvkeep."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def pair(runs, job, model_folder):
    """An engine with short convolutions beside attention that keeps no states, with kvkeep and without."""
    options = {"enable_prefix_caching": False}
    folder = model_folder("lfm2")
    return (
        runs.run("refused", job("one_prompt", keep={}, options=options), folder),
        runs.run("refused-plain", job("one_prompt", options=options), folder),
    )


def test_why_it_is_not_kept_is_named(pair):
    assert "recurrent state is kept at no boundary" in pair[0].facts["refusal"]
    assert "mamba_cache_mode" in pair[0].facts["refusal"]


def test_nothing_is_kept_of_it_and_no_store_is_started(pair):
    assert pair[0].facts["stores"] == []
    assert pair[0].metric("external_prefix_cache_hits") == 0


def test_the_engine_answers_as_if_kvkeep_was_not_there(pair):
    for step in ("whole cold", "extension", "two at once cold"):
        for ours, theirs in zip(pair[0].answers(step), pair[1].answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"]


def test_every_request_has_its_reason_in_the_metrics(pair):
    assert pair[0].figure("miss_refused") == sum(len(step["answers"]) for step in pair[0].facts["steps"].values())


def test_latent_attention_without_amx_is_refused_and_answers_the_same(runs, job, model_folder):
    options = {"attention_config": {"backend": "CPU_MLA"}, "block_size": 16}
    ours = runs.run("latent", job("one_prompt", keep={}, options=options), model_folder("mla"))
    theirs = runs.run("latent-plain", job("one_prompt", options=options), model_folder("mla"))
    assert "MLA" in ours.facts["refusal"]
    assert ours.metric("external_prefix_cache_hits") == 0
    for step in ("whole cold", "whole warm", "extension"):
        assert ours.answers(step)[0]["logprobs"] == theirs.answers(step)[0]["logprobs"]
