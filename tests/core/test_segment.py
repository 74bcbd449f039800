from __future__ import annotations

from hashlib import sha256

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.key import Chain, none_hash
from kvkeep.core.segment import segments

SEPARATOR = [7, 8]


def oracle(tokens: list[int], extra_keys: tuple | None = None) -> bytes:
    return sha256(cbor2.dumps((None, tuple(tokens), extra_keys), canonical=True)).digest()


def parts(tokens: list[int], separator: list[int] = SEPARATOR) -> list[list[int]]:
    return [tokens[start:end] for start, end, _ in segments(tokens, separator)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([7], [[7]]),
        ([7, 8], []),
        ([7, 8, 7, 8], []),
        ([1, 2, 3], [[1, 2, 3]]),
        ([1, 7, 8, 2], [[1], [2]]),
        ([7, 8, 1], [[1]]),
        ([1, 7, 8], [[1]]),
        ([1, 7, 8, 7, 8, 2, 7, 8, 7, 8], [[1], [2]]),
        ([1, 7, 7, 8, 8, 2, 7], [[1, 7], [8, 2, 7]]),
    ],
)
def test_splits_at_separators_and_leaves_no_empty_segment(tokens, expected):
    assert parts(tokens) == expected


def test_separators_that_overlap_themselves_are_found_from_the_left():
    assert parts([1, 1, 1, 2], [1, 1]) == [[1, 2]]
    assert parts([5, 1, 1, 1, 1, 6], [1, 1]) == [[5], [6]]


@given(st.lists(st.integers(6, 9), max_size=30), st.lists(st.integers(6, 9), min_size=1, max_size=3))
def test_splits_as_text_does(tokens, separator):
    text, between = bytes(tokens), bytes(separator)
    assert parts(tokens, separator) == [list(part) for part in text.split(between) if part]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_a_digest_is_cbor2s_and_does_not_depend_on_the_place(tokens):
    first, second = segments([*tokens, 2**31 + 1, 2**31, *tokens], [2**31 + 1, 2**31])[:2]
    assert first.digest == second.digest == oracle(tokens)


def test_a_segment_is_not_a_chunk_and_extra_keys_count():
    tokens = list(range(100, 116))
    (plain,) = segments(tokens, SEPARATOR)
    assert plain.digest != Chain(16, none_hash()).extend(tokens)[0]
    salted = [segments(tokens, SEPARATOR, (("cache_salt", salt),))[0].digest for salt in "ab"]
    assert salted == [oracle(tokens, (("cache_salt", salt),)) for salt in "ab"]
    assert len({plain.digest, *salted}) == 3


def test_ranges_are_of_the_whole_prompt():
    assert [(start, end) for start, end, _ in segments(np.array([7, 8, 1, 2, 7, 8, 3]), SEPARATOR)] == [(2, 4), (6, 7)]


def test_wrong_tokens_and_an_empty_separator_are_refused():
    with pytest.raises(ValueError, match=r"^token 2 is -1"):
        segments([1, 2, -1], SEPARATOR)
    with pytest.raises(ValueError, match="at least one token"):
        segments([1, 2], [])
