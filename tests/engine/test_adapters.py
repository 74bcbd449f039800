"""What an adapter is made of is what all ranks have loaded; a name with two contents stands for neither."""

from __future__ import annotations

import pytest

from kvkeep.doors.vllm.loaded import MAX_ADAPTERS, Adapter, Adapters, Expected, LoadedAdapter, Resident

FIRST = Adapter(1, "first", "/a")


def load(adapters: Adapters, number: int, digest: str, ranks: int = 1) -> None:
    """A step is over before which all ranks loaded this."""
    loads = [LoadedAdapter(rank, number, digest) for rank in range(ranks)]
    adapters.take(loads, [Resident(rank, frozenset({number})) for rank in range(ranks)])


def test_before_it_is_loaded_nothing_is_known_of_it() -> None:
    adapters = Adapters()
    assert adapters.begin(FIRST) is None
    load(adapters, 1, "aa")
    content = adapters.begin(FIRST)
    assert content is not None
    assert adapters.is_still(FIRST, content)
    assert adapters.expected(FIRST) == Expected(1, ("aa",))


def test_the_content_counts_and_neither_number_nor_name() -> None:
    """Names are in the engine's own keys; numbers are others after a restart."""
    adapters, others = Adapters(), Adapters()
    load(adapters, 1, "aa")
    load(others, 7, "aa")
    assert adapters.begin(FIRST) == others.begin(Adapter(7, "other", "/elsewhere"))
    load(others, 7, "bb")
    assert others.begin(Adapter(7, "third", "/elsewhere")) not in {None, adapters.begin(FIRST)}


def test_every_rank_must_have_it_and_each_ones_part_counts() -> None:
    contents = set()
    for parts in (("aa", "bb"), ("bb", "aa"), ("aa", "aa")):
        adapters = Adapters(ranks=2)
        adapters.take([LoadedAdapter(0, 1, parts[0])], [Resident(0, frozenset({1}))])
        assert adapters.begin(FIRST) is None
        adapters.take([LoadedAdapter(1, 1, parts[1])], [Resident(1, frozenset({1}))])
        contents.add(adapters.begin(FIRST))
    assert len(contents - {None}) == 3


def test_a_digest_that_cannot_be_had_leaves_it_in_doubt() -> None:
    adapters = Adapters()
    load(adapters, 1, "")
    assert adapters.begin(FIRST) is None


def test_one_that_the_engine_has_dropped_is_unknown_until_it_is_loaded_again() -> None:
    adapters = Adapters()
    load(adapters, 1, "aa")
    content = adapters.begin(FIRST)
    adapters.take([], [Resident(0, frozenset({2}))])
    assert adapters.begin(FIRST) is None
    assert adapters.is_still(FIRST, content), "those that run may go on: it is looked at when it is loaded"
    load(adapters, 1, "aa")
    assert adapters.begin(FIRST) == content


def test_one_that_each_step_loads_anew_is_never_known() -> None:
    adapters = Adapters()
    load(adapters, 1, "aa")
    assert adapters.begin(FIRST._replace(anew=True)) is None


@pytest.mark.parametrize("other", [FIRST, Adapter(2, "first", "/a")], ids=["in place", "unloaded and loaded"])
def test_a_name_under_which_two_contents_were_computed_stands_for_neither(other: Adapter) -> None:
    """The engine's own cache gives a request blocks of either."""
    adapters = Adapters()
    load(adapters, 1, "aa")
    content = adapters.begin(FIRST)
    adapters.take([], [])
    load(adapters, other.number, "bb")
    assert not (other == FIRST and adapters.is_still(FIRST, content))
    assert adapters.begin(other) is None
    adapters.take([], [])
    load(adapters, other.number, "aa")
    assert adapters.begin(other) is None, "the blocks of the other content are still there"
    adapters.emptied([])
    assert adapters.begin(other) == content


def test_two_of_one_name_that_are_computed_in_the_same_step_are_both_in_doubt_when_it_is_over() -> None:
    adapters, second = Adapters(), Adapter(2, "first", "/a")
    adapters.take([LoadedAdapter(0, 1, "aa"), LoadedAdapter(0, 2, "bb")], [Resident(0, frozenset({1, 2}))])
    contents = adapters.begin(FIRST), adapters.begin(second)
    assert None not in contents
    adapters.take([], [])
    assert not adapters.is_still(FIRST, contents[0])
    assert not adapters.is_still(second, contents[1])


def test_what_changes_between_a_reset_and_the_next_request_is_no_doubt() -> None:
    """As trainers do it: load new weights in place, empty the cache, or the other way round."""
    adapters = Adapters()
    load(adapters, 1, "aa")
    old = adapters.begin(FIRST)
    adapters.take([], [])
    adapters.emptied([])
    assert adapters.begin(FIRST) == old  # the ranks have not told of the new one
    load(adapters, 1, "bb")
    assert not adapters.is_still(FIRST, old), "that request was computed with the new one"
    new = adapters.begin(FIRST)
    assert new not in {None, old}
    adapters.take([], [])
    assert adapters.begin(FIRST) == new


def test_requests_that_go_on_after_a_reset_count() -> None:
    adapters = Adapters()
    load(adapters, 1, "aa")
    adapters.begin(FIRST)
    adapters.emptied([FIRST])
    adapters.take([], [])
    load(adapters, 1, "bb")
    assert adapters.begin(FIRST) is None


def test_a_load_whose_content_never_became_known_leaves_its_name_in_doubt() -> None:
    """It was overtaken by another one, and requests had been computed with it."""
    adapters = Adapters()
    load(adapters, 1, "")
    assert adapters.begin(FIRST) is None
    load(adapters, 1, "")
    load(adapters, 1, "aa")
    assert adapters.begin(FIRST) is None
    adapters.emptied([])
    assert adapters.begin(FIRST) is not None


def test_requests_that_run_are_in_doubt_as_long_as_it_is_not_known_what_was_loaded_again() -> None:
    adapters = Adapters()
    load(adapters, 1, "")
    load(adapters, 1, "aa")
    content = adapters.begin(FIRST)
    assert content is not None
    load(adapters, 1, "")
    assert not adapters.is_still(FIRST, content)
    assert adapters.begin(FIRST) is None
    load(adapters, 1, "aa")
    assert adapters.begin(FIRST) == content, "it was the same"


def test_what_is_remembered_is_bounded() -> None:
    adapters = Adapters()
    for number in range(1, MAX_ADAPTERS + 3):
        load(adapters, number, "aa")
    assert len(adapters._digests) == MAX_ADAPTERS
    assert adapters.begin(FIRST) is None


def test_a_step_without_news_asks_nothing_of_the_requests() -> None:
    adapters = Adapters()
    assert adapters.take([LoadedAdapter(0, 1, "aa")], [Resident(0, frozenset({1}))])
    assert not adapters.take([], [])
    adapters.begin(FIRST)
    assert adapters.take([], []), "the first step with this adapter"
    assert not adapters.take([], [Resident(0, frozenset({1, 2}))])
    adapters.emptied([FIRST])
    assert adapters.take([], [])
