from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.mask import masked_tokens, ret_mask, store_mask, token_mask

CHUNK = 4


@given(st.integers(0, 5), st.integers(0, 9))
def test_what_a_store_mask_leaves_out_is_read_back(chunks, rest):
    num_tokens = chunks * CHUNK + rest
    mask = store_mask(num_tokens, chunks * CHUNK)
    assert mask.tolist() == [False] * chunks * CHUNK + [True] * rest
    for form in (mask, mask.tolist(), tuple(mask.tolist())):
        assert masked_tokens(form, num_tokens, CHUNK) == chunks * CHUNK


@given(st.integers(0, 30), st.data())
def test_a_token_mask_leaves_out_whole_chunks_only(num_tokens, data):
    computed = data.draw(st.integers(0, num_tokens))
    assert masked_tokens(token_mask(num_tokens, computed, CHUNK), num_tokens, CHUNK) == computed // CHUNK * CHUNK


@pytest.mark.parametrize(("computed", "masked"), [(0, 0), (272, 256), (512, 512), (600, 512), (700, 512)])
def test_example_of_a_prompt_of_700_tokens(computed, masked):
    assert np.flatnonzero(~token_mask(700, computed, 256)).tolist() == list(range(masked))


def test_no_mask_leaves_out_nothing():
    assert masked_tokens(None, 7, CHUNK) == 0


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([True] * 7, "shape \\(7,\\) for 8 tokens"),
        ([[True] * 8], "shape \\(1, 8\\) for 8 tokens"),
        ([1] * 8, "not of bool"),
        ([False] * 2 + [True] * 6, "^2 masked tokens are not a multiple of chunk_tokens 4"),
        ([True] * 4 + [False] * 4, "^token 4 is masked behind token 0"),
        ([False] * 4 + [True, True, False, True], "^token 6 is masked behind token 4"),
    ],
)
def test_a_mask_of_another_form_is_refused(mask, why):
    with pytest.raises(ValueError, match=why):
        masked_tokens(mask, 8, CHUNK)


@given(st.integers(0, 8), st.integers(0, CHUNK - 1), st.data())
def test_a_ret_mask_is_true_exactly_where_chunks_have_arrived(chunks, rest, data):
    arrived = data.draw(st.sets(st.integers(0, chunks - 1))) if chunks else set()
    mask = ret_mask(chunks * CHUNK + rest, CHUNK, arrived)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [token // CHUNK in arrived for token in range(chunks * CHUNK + rest)]


@pytest.mark.parametrize("number", [-1, 1])
def test_a_chunk_that_is_not_whole_cannot_have_arrived(number):
    with pytest.raises(ValueError, match="is not one of 7 tokens"):
        ret_mask(7, CHUNK, [number])


def test_more_stored_tokens_than_there_are_are_refused():
    with pytest.raises(ValueError, match="9 of 8"):
        store_mask(8, 9)
