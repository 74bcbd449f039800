from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.core.policies.policy import EvictionPolicy
from kvkeep.core.policies.queue import Queue, lru
from kvkeep.core.policies.ranked import Ranked, lfu
from kvkeep.core.policies.registry import POLICIES, policy_by_name

MAKERS = POLICIES  # every policy that has a name is held to its definition below
KEYS = [bytes([letter]) * 48 for letter in b"abcdefgh"]
A, B, C, D = KEYS[:4]


class Naive:
    """The definition: sort all keys by what the policy's name says, take the first that is not hidden."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.now = 0
        self.inserted: dict[bytes, int] = {}
        self.touched: dict[bytes, int] = {}
        self.uses: dict[bytes, int] = {}
        self.hidden: set[bytes] = set()

    def insert(self, key: bytes) -> None:
        self.uses[key] = 0
        self.touch(key)
        self.inserted[key] = self.now

    def touch(self, key: bytes) -> None:
        self.now += 1
        self.touched[key] = self.now
        self.uses[key] += 1

    def missed(self, key: bytes) -> None:
        pass

    def remove(self, key: bytes) -> None:
        del self.inserted[key], self.touched[key], self.uses[key]
        self.hidden.discard(key)

    def hide(self, key: bytes) -> None:
        self.hidden.add(key)

    def show(self, key: bytes) -> None:
        self.hidden.remove(key)

    def evict(self) -> bytes | None:
        place = {
            "fifo": lambda key: self.inserted[key],
            "lru": lambda key: self.touched[key],
            "mru": lambda key: -self.touched[key],
            "lfu": lambda key: (self.uses[key], self.touched[key]),
        }[self.name]
        victim = min((key for key in self.inserted if key not in self.hidden), key=place, default=None)
        if victim is not None:
            self.remove(victim)
        return victim


# a verb of these tests -> the policy's call, and what it takes behind the key
CALLS: dict[str, tuple[str, tuple[object, ...]]] = {
    "insert": ("insert", (4096, 1.0)),
    "touch": ("touch", ()),
    "missed": ("missed", ()),
    "remove": ("remove", ()),
    "hide": ("set_hidden", (True,)),
    "show": ("set_hidden", (False,)),
    "evict": ("evict", ()),
}


def legal(naive: Naive, verb: str, key: bytes) -> bool:
    known, hidden = key in naive.inserted, key in naive.hidden
    return {"insert": not known, "missed": not known, "hide": known and not hidden, "show": hidden, "evict": True}.get(
        verb, known
    )


def play(name: str, calls: list[tuple[str, bytes]]) -> None:
    policy, naive = MAKERS[name](), Naive(name)
    for verb, key in calls:
        if not legal(naive, verb, key):
            continue
        call, args = CALLS[verb]
        assert getattr(policy, call)(*(() if verb == "evict" else (key, *args))) == getattr(naive, verb)(
            *(() if verb == "evict" else (key,))
        )
    for key in list(naive.hidden):
        policy.set_hidden(key, False)
        naive.show(key)
    while (victim := naive.evict()) is not None:
        assert policy.evict() == victim
    assert policy.evict() is None


VERBS = ["insert", "insert", "touch", "touch", "missed", "hide", "show", "evict", "remove"]


@pytest.mark.parametrize("name", MAKERS)
@given(calls=st.lists(st.tuples(st.sampled_from(VERBS), st.sampled_from(KEYS)), max_size=80))
@settings(max_examples=150, deadline=None)
def test_evicts_as_its_definition_says(name, calls):
    play(name, calls)


@pytest.mark.parametrize("name", MAKERS)
def test_evicts_as_its_definition_says_over_many_rebuilds(name):
    """Long enough for the heap to be rebuilt, which a short sequence never reaches."""
    draw = random.Random(11)
    play(name, [(draw.choice(VERBS[:-2] * 4 + VERBS), draw.choice(KEYS * 5)) for _ in range(6000)])


def filled(name: str, keys: list[bytes]) -> Queue | Ranked:
    policy = MAKERS[name]()
    for key in keys:
        policy.insert(key, 1, 1.0)
    return policy


def drain(policy: Queue | Ranked) -> list[bytes]:
    return list(iter(policy.evict, None))


@pytest.mark.parametrize(
    ("name", "order"),
    [("fifo", [A, B, C, D]), ("lru", [B, D, C, A]), ("mru", [A, C, D, B]), ("lfu", [B, D, C, A])],
)
def test_order(name, order):
    policy = filled(name, [A, B, C, D])
    policy.touch(A)
    policy.touch(C)
    policy.touch(A)
    assert drain(policy) == order


@pytest.mark.parametrize(("name", "order"), [("fifo", [A, B, C]), ("lru", [A, B, C]), ("mru", [C, B, A])])
def test_a_shown_key_is_back_at_its_place_even_if_evict_has_passed_it(name, order):
    policy = filled(name, [A, B, C])
    for key in (A, B, C):
        policy.set_hidden(key, True)
    assert policy.evict() is None
    for key in (B, C, A):
        policy.set_hidden(key, False)
    assert drain(policy) == order


def test_pinned_and_used_keys_are_passed_over_until_none_is_left():
    policy = filled("lru", [A, B, C, D])
    policy.set_hidden(A, True)
    policy.set_hidden(C, True)
    assert drain(policy) == [B, D]
    policy.set_hidden(C, False)
    assert drain(policy) == [C]


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_kept_for_a_key_does_not_grow_with_use(name):
    policy = filled(name, KEYS)
    for _ in range(2000):
        for key in KEYS:
            policy.set_hidden(key, True)
            policy.touch(key)
            policy.set_hidden(key, False)
        policy.remove(KEYS[0])
        policy.insert(KEYS[0], 1, 1.0)
    if isinstance(policy, Ranked):
        assert len(policy._heap) <= 2 * len(KEYS) + 65
        assert len(policy._keys) == len(KEYS)
        assert len(policy._free_slots) == 0


@pytest.mark.parametrize("name", ["fifo", "lru"])
def test_keys_that_come_and_go_while_evict_has_passed_them_leave_little(name):
    policy = filled(name, KEYS)
    for key in KEYS[:-1]:
        policy.set_hidden(key, True)
    assert policy.evict() == KEYS[-1]
    policy.insert(KEYS[-1], 1, 1.0)
    for _ in range(1000):
        for key in KEYS[:-1]:
            policy.set_hidden(key, False)
        for key in KEYS[:-1]:
            policy.set_hidden(key, True)
    assert len(policy._candidates) <= 2 * len(KEYS) + 65
    assert policy.evict() == KEYS[-1]
    assert policy._candidates == []


@pytest.mark.parametrize("hidden_at_last", [False, True])
def test_keys_that_evict_has_passed_go_in_the_order_in_which_it_last_did(hidden_at_last):
    policy = filled("lru", [A, B, C, D])
    for key in (A, B, C, D):
        policy.set_hidden(key, True)
    policy.insert(KEYS[4], 1, 1.0)
    assert policy.evict() == KEYS[4]  # past all four
    policy.set_hidden(A, False)
    policy.touch(A)
    policy.set_hidden(A, True)
    policy.insert(KEYS[5], 1, 1.0)
    assert policy.evict() == KEYS[5]  # past A again, which is the last of them now
    for key in (A, C, B):
        policy.set_hidden(key, False)
    if hidden_at_last:
        policy.set_hidden(B, True)
    assert drain(policy) == ([C, A] if hidden_at_last else [B, C, A])


def test_clearing_up_what_evict_has_passed_keeps_what_was_shown():
    policy = filled("lru", [A, B, C])
    for key in (A, B):
        policy.set_hidden(key, True)
    assert policy.evict() == C
    policy.set_hidden(B, False)
    for _ in range(200):
        policy.set_hidden(A, False)
        policy.set_hidden(A, True)
    assert policy.evict() == B
    assert policy.evict() is None


@pytest.mark.parametrize("verb", ["touch", "remove", "hide", "show"])
def test_an_unknown_key_is_a_broken_invariant(verb):
    call, args = CALLS[verb]
    for make in (lru, lfu):
        with pytest.raises(AssertionError, match="never inserted"):
            getattr(make(), call)(A, *args)


def test_doing_it_twice_is_a_broken_invariant():
    for name in POLICIES:
        broken_by_doing_it_twice(filled(name, [A]))


def broken_by_doing_it_twice(policy: EvictionPolicy) -> None:
    with pytest.raises(AssertionError, match="inserted twice"):
        policy.insert(A, 1, 1.0)
    with pytest.raises(AssertionError, match="not hidden"):
        policy.set_hidden(A, False)
    policy.set_hidden(A, True)
    with pytest.raises(AssertionError, match="hidden already"):
        policy.set_hidden(A, True)


@pytest.mark.parametrize("name", ["fifo", "LRU", "Lfu", "mru"])
def test_policies_have_names_in_any_case(name):
    policy = policy_by_name(name)
    policy.insert(A, 1, 1.0)
    policy.insert(B, 1, 1.0)
    assert policy.evict() == (B if name == "mru" else A)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'arc': choose one of fifo, lfu, lru, mru"):
        policy_by_name("arc")
