"""Frames: any split of any frames gives them back; a length over the bound is an error before its bytes are awaited."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import WireError
from kvkeep.wire.frames import MAX_FRAME_NBYTES, FrameReader, framed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_of_any_frames(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(framed, payloads))
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = FrameReader()
    got: list[bytes] = []
    for start, end in pairwise(places):
        got += reader.feed(stream[start:end])
        whole = [sum(len(framed(one)) for one in payloads[:n]) <= end for n in range(1, len(payloads) + 1)]
        assert got == payloads[: sum(whole)], "a frame comes as soon as its last byte is there, and not before"
    assert got == payloads


def test_a_frame_of_the_largest_size_passes_and_one_more_byte_does_not() -> None:
    largest = bytes(MAX_FRAME_NBYTES)
    assert FrameReader().feed(framed(largest)) == [largest]
    with pytest.raises(WireError, match="over the bound"):
        framed(largest + b"x")


@pytest.mark.parametrize("nbytes", [MAX_FRAME_NBYTES + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("before", [b"", framed(b"one"), framed(b"")])
def test_a_length_over_the_bound_is_refused_with_its_header_alone(nbytes: int, before: bytes) -> None:
    reader = FrameReader()
    header = nbytes.to_bytes(4, "big")
    assert reader.feed(before + header[:3]) == ([before[4:]] if before else [])
    with pytest.raises(WireError, match=str(nbytes)):
        reader.feed(header[3:])
