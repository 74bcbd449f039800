"""Faults of the tier, of the store and of a load, for each way of copying, in real engines: right answers all the same.

The engines run once a model (engines/faults.py); the tests read their facts.
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.vllm

QUARTER, CHUNKS = 256, {"tiny": 4, "hybrid": 4, "lfm2": 8}
MODELS = {"tiny": ["bulk", "layerwise", "async"], "hybrid": ["async", "layerwise"], "lfm2": ["async", "layerwise"]}
WAYS = [(model, way) for model, ways in MODELS.items() for way in ways]
TIER = {  # the quarters that are given all the same; with recurrent states there is one at the end, so that it is none
    "the first read fails": 0,
    "a middle read fails": 2,
    "the last read fails": 3,
    "every read fails": 0,
    "a bit of a range": 2,
    "a bit of the last range's end": 3,
    "a bit of the header": 0,
    "torn": 3,
    "another chunk's record": 2,
    "gone": 1,
    "late": 0,
}
OF_STATES = ["the state's read fails", "a bit of the state", "the state is gone"]
LOST = {  # the quarters that are given all the same, and why other requests miss
    "before the lookup": (0, {"store_gone": 2}),
    "in the lookup": (0, {"store_gone": 2}),
    "after the promise": (4, {"short": 1}),
    "replaced after the promise": (4, {"short": 1}),
    "in mid-load": (4, {"short": 1}),
    "in mid-store": (0, {"not_stored": 1, "short": 1}),
}
LOADS = {"first": 0, "middle": 2, "last": 3, "all": 0, "last, written": 3, "one layer": 1, "fail": 1}  # where it fails


class Case:
    """The facts of one case on one engine; `right` are the answers without kvkeep."""

    def __init__(self, facts: dict[str, Any], right: dict[str, Any]) -> None:
        self.facts = facts
        self.right = right

    def misses(self, part: str) -> dict[str, int]:
        rise = self.facts[part]["rise"]
        return {name.removeprefix("miss_"): count for name, count in rise.items() if name.startswith("miss_")}

    def rise(self, part: str, name: str) -> int:
        return self.facts[part]["rise"].get(name, 0)

    def check_answers(self, **asked: tuple[str, ...]) -> None:
        """Each part's answers are those of these prompts, and no request ended in another way."""
        for part, names in asked.items():
            found = self.facts[part.replace("_", " ")]
            assert found["tokens"] == [self.right[name] for name in names], part
            assert found["ends"] == ["length"] * len(names), part

    def check_whole(self, *parts: str, tokens: int = 4 * QUARTER) -> None:
        """All of it is given, and nothing is missed."""
        for part in parts:
            assert self.rise(part, "external") == self.rise(part, "delivered_tokens") == tokens, part
            assert self.misses(part) == {}, part


@pytest.fixture(scope="module", params=WAYS, ids=" ".join)
def engine(request: pytest.FixtureRequest, once: Any) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """A model, a way, what its engine found, the right answers."""
    model, way = request.param
    found = once(model)
    return model, way, found[way], found["right"]


@pytest.fixture(scope="module")
def once(script_run: Any) -> Any:
    """The facts of a model's engines; they run when they are first asked for, and not again if that fails."""
    done: dict[str, Any] = {}

    def facts(model: str) -> Any:
        assert done.setdefault(model, "not run yet"), "its engines have failed before"
        if done[model] == "not run yet":
            done[model] = None
            done[model] = script_run("faults.py", "kvkeep", 1, model)
        return done[model]

    return facts


def given(model: str, quarters: int) -> int:
    """The tokens that are given where only this much can be."""
    return quarters * QUARTER if model != "lfm2" or quarters == 4 else 0


@pytest.mark.parametrize("name", [*TIER, *OF_STATES])
def test_what_a_tier_does_not_give_is_computed_and_kept_again(engine: Any, name: str) -> None:
    model, _, found, right = engine
    if f"tier: {name}" not in found["cases"]:
        pytest.skip("this model has no states")
    case = Case(found["cases"][f"tier: {name}"], right)
    hits = given(model, TIER.get(name, 0))
    case.check_answers(with_it=("long", "small"), after_it=("long",), from_disk=("long",))
    assert case.rise("with it", "external") == case.rise("with it", "delivered_tokens") == hits
    assert case.rise("with it", "disk_fetched_chunks") == hits * CHUNKS[model] // (4 * QUARTER)
    why = {"late": "tier_late", "gone": "tier_evicted", "the state is gone": "tier_evicted"}.get(name, "tier_failed")
    assert case.misses("with it") == {why: 1, "short": 1}
    case.check_whole("after it", "from disk")
    assert case.rise("from disk", "disk_fetched_chunks") == CHUNKS[model]
    assert case.facts["held"] == {}


def test_a_read_that_hangs_is_waited_for_once_and_keeps_no_other_from_the_disk(engine: Any) -> None:
    found, right = engine[2:]
    case = Case(found["cases"]["hang: a read"], right)
    asked = dict.fromkeys(("first", "second", "third", "kept", "from_disk"), ("long",))
    case.check_answers(**asked, another=("new 0",))
    assert case.misses("first") == {"tier_late": 1}, "one waits for its deadline"
    for part in ("second", "third"):
        assert case.rise(part, "external") == 0
        assert case.misses(part) in ({"tier_failed": 1}, {"tier_left_alone": 1}), "nobody else does"
    case.check_whole("kept")
    assert case.rise("kept", "disk_fetched_chunks") == 0, "what was computed is kept although its read hangs"
    assert case.rise("another", "disk_fetched_chunks") > 0, "the tier is used again"
    assert case.facts["hung"] > 0, "while the read hangs"
    case.check_whole("from disk")
    assert case.facts["held"] == {}


@pytest.mark.parametrize("name", LOST)
def test_an_engine_goes_on_without_its_store_and_hits_again_when_it_is_back(engine: Any, name: str) -> None:
    model, _, found, right = engine
    case = Case(found["cases"][f"store: {name}"], right)
    hits, misses = LOST[name]
    if model == "lfm2" and name != "replaced after the promise":  # its requests come one after the other
        misses = {"store_gone" if why == "short" else why: count for why, count in misses.items()}
    asked = "new 0" if name == "in mid-store" else "long"
    case.check_answers(with_it=(asked, "small"), after_it=(asked,), from_disk=("long",))
    assert case.rise("with it", "external") == case.rise("with it", "delivered_tokens") == given(model, hits)
    assert case.misses("with it") == misses
    assert case.rise("with it", "store_losses") == 1
    if name != "replaced after the promise":
        case.check_answers(without=("new 1",))
        assert case.misses("without") == {"store_gone": 1}
    if name == "in mid-store":  # nothing of it had become readable
        assert (case.rise("with it", "stored_chunks"), case.misses("after it")) == (0, {"not_stored": 1})
    else:
        case.check_whole("after it")
    case.check_whole("from disk")
    assert case.facts["held"] == {}


@pytest.mark.parametrize("name", [*LOADS, "the state"])
def test_a_load_that_fails_after_the_promise_is_computed_and_not_given_again(engine: Any, name: str) -> None:
    model, _, found, right = engine
    if f"load: {name}" not in found["cases"]:
        pytest.skip("this way does not load layer by layer, or this model has no states")
    case = Case(found["cases"][f"load: {name}"], right)
    asked, promised = ("whole" if name == "last, written" else "long"), 4 * QUARTER
    if name == "last, written":  # a token is always computed, and a state cannot be cut
        promised -= 4 * QUARTER // CHUNKS[model] if model == "lfm2" else 1
    quarters = LOADS.get(name, 0)
    before = quarters * QUARTER
    again = given(model, quarters) if model != "tiny" and name != "fail" else 0  # the request starts over
    assert case.facts["failures"] > 0
    if name == "fail":
        assert case.facts["with it"]["ends"] == ["error", "length"]
        assert case.facts["with it"]["tokens"][1] == right["small"]
    else:
        case.check_answers(with_it=(asked, "small"))
    assert case.rise("with it", "external") == promised + again
    assert case.rise("with it", "failed_tokens") == promised - before
    assert case.rise("with it", "delivered_tokens") == before + again
    case.check_answers(after_it=(asked,))
    assert case.rise("after it", "external") == case.rise("after it", "delivered_tokens") == given(model, quarters)
    assert case.misses("after it") == {"failed_before": 1}
    assert case.facts["held"] == {}


def test_over_all_of_it_the_accounts_are_vllm_s(engine: Any) -> None:
    totals = engine[2]["totals"]
    assert totals["claimed_first_tokens"] == totals["external"] > 0
    assert totals["claimed_after_preemption_tokens"] == 0
    assert totals["delivered_tokens"] == totals["claimed_first_tokens"] - totals["failed_tokens"]
