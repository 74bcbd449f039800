"""The two hazards of a cache beside an engine: a load that fails after the promise, and a block that is shared.

Each engine runs once; the tests read its facts. The reference is an engine without kvkeep.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def reference(script_run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return script_run("hazards.py", "plain", 1)["cold"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks, one fails"])
def facts(request: pytest.FixtureRequest, script_run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return script_run("hazards.py", "kvkeep", request.param)


def test_cold_answers_are_the_reference(facts: dict[str, Any], reference: dict[str, Any]) -> None:
    assert facts["cold"] == reference


def test_no_chunk_of_a_step_with_a_failed_load_is_readable(facts: dict[str, Any]) -> None:
    assert facts["failed_load"]["readable_r"] == 0
    assert facts["failed_load"]["readable_p"] == 0
    assert facts["failed_load"]["figures"]["dropped_chunks"] > 0
    assert facts["failed_load"]["figures"]["failed_tokens"] == 512


def test_after_a_failed_load_every_answer_is_the_reference(facts: dict[str, Any], reference: dict[str, Any]) -> None:
    failed = facts["failed_load"]
    assert failed["p"] == failed["p_again"] == reference["p"]
    assert failed["q"] == reference["q"]
    assert failed["r"] == reference["r"]


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_an_end_between_failure_and_recompute_leaves_no_garbage(
    facts: dict[str, Any], reference: dict[str, Any], how: str
) -> None:
    assert facts[how]["q"] == reference["q"]
    assert facts[how]["p"] == reference["p"]


def test_what_another_request_built_on_a_failed_load_is_not_reused(
    facts: dict[str, Any], reference: dict[str, Any]
) -> None:
    assert facts["built_on"]["long"] == reference["long"]


def test_another_request_that_began_with_a_failed_load_answers_right_and_so_does_the_next_start(
    script_run: Callable[..., dict[str, Any]],
    reference: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVKEEP_DISK_PATH", str(tmp_path))
    first = script_run("shared_load.py", "first", 1)
    assert first["long"] == reference["long"]
    assert first["figures"]["failed_tokens"] > 0
    again = script_run("shared_load.py", "again", 1)
    assert again["long"] == reference["long"]
    assert first["stats"]["problem"] == again["stats"]["problem"] == ""


def test_a_block_that_the_engine_computed_is_never_written(facts: dict[str, Any], reference: dict[str, Any]) -> None:
    partial = facts["partial"]
    assert partial["claimed"] == 480
    assert partial["not_zero"]
    assert partial["same_bytes"]
    assert partial["p"] == reference["p"]
    assert partial["x"] == reference["x"]


@pytest.mark.parametrize("part", ["failed_load", "abort", "preempt", "built_on", "partial"])
def test_nothing_stays_pinned(facts: dict[str, Any], part: str) -> None:
    stats = facts[part]["stats"]
    assert stats["problem"] == ""
    assert stats["pinned_nbytes"] == stats["writing_nbytes"] == stats["quarantined_nbytes"] == 0


def test_claims_add_up_with_vllm(facts: dict[str, Any]) -> None:
    figures = facts["figures"]
    assert figures["claimed_first_tokens"] == facts["metrics"]["vllm:external_prefix_cache_hits"]
    claimed = figures["claimed_first_tokens"] + figures["claimed_after_preemption_tokens"]
    assert figures["delivered_tokens"] == claimed - figures["failed_tokens"]


BESIDE = {"one group": ("tiny", 1), "several groups": ("hybrid", 1), "two ranks, one fails": ("tiny", 2)}


@pytest.fixture(scope="module", params=list(BESIDE))
def beside(request: pytest.FixtureRequest, script_run: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads beside the steps, with kvkeep and without."""
    model, ranks = BESIDE[request.param]
    return script_run("beside.py", "kvkeep", ranks, model), script_run("beside.py", "plain", 1, model)


@pytest.mark.parametrize("which", ["first", "second", "all"])
def test_a_load_that_fails_beside_the_steps_is_computed_again(beside: Any, which: str) -> None:
    found, right = beside[0][which], beside[1]["cold"]
    assert found["failed"] > 0
    assert found["p"] == found["p_again"] == right["p"]
    assert found["q"] == found["q_again"] == right["q"]
    assert found["stats"]["problem"] == ""
    assert found["stats"]["pinned_nbytes"] == found["stats"]["writing_nbytes"] == 0


def test_a_request_given_up_in_mid_load_gives_its_blocks_back(beside: Any) -> None:
    found = beside[0]["given up"]
    assert found["free"] == found["total"]
    assert found["p"] == beside[1]["cold"]["p"]
    assert found["stats"]["pinned_nbytes"] == 0


@pytest.mark.parametrize("load", ["sync", "async"])
def test_where_vllm_s_own_policy_is_kept_a_failed_load_fails_its_request_and_no_other(
    script_run: Callable[..., dict[str, Any]], load: str
) -> None:
    found = script_run("fails.py", load, 1)
    assert found["reasons"] == {"p": "error", "r": "length"}
    assert (found["r"], found["q"]) == (found["cold"]["r"], found["cold"]["q"])
    assert found["held"] == 0
    assert found["stats"]["problem"] == ""
    assert found["stats"]["pinned_nbytes"] == found["stats"]["writing_nbytes"] == 0
