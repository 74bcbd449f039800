from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvkeep.core.names import ChunkName, parse_name

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("@%=/- 0aé", max_size=8)
NAMES = st.builds(
    ChunkName,
    model=TEXT,
    world=st.integers(0, 2**40),
    rank=st.integers(0, 300),
    digest=st.binary(max_size=32),
    dtype=TEXT,
    layers=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200)),
    tags=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
)
PLAIN = ChunkName("meta-llama/Llama-3.1-8B", 2, 1, bytes(range(4)), "bfloat16")


def test_texts():
    assert str(PLAIN) == "meta-llama/Llama-3.1-8B@2@1@00010203@bfloat16"
    assert str(PLAIN._replace(layers=(7, 7))) == f"{PLAIN}@7"
    assert str(PLAIN._replace(layers=(0, 15), tags=(("user", "a@b"),))) == f"{PLAIN}@0-15@user=a%40b"
    assert str(PLAIN._replace(model="my model@v=1 100%")).startswith("my%20model%40v%3D1%20100%25@")


@given(NAMES)
@example(PLAIN._replace(tags=(("7", "8"), ("", ""))))
@example(PLAIN._replace(model="", dtype="7", digest=b""))
def test_a_name_round_trips(name):
    text = str(name)
    assert parse_name(text) == name
    assert text.isascii()
    assert " " not in text


@given(NAMES, NAMES)
def test_two_names_have_two_texts(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model",
        "m@1@0@00@bf16@",
        "m@1@0@0@bf16",
        "m@1@0@AA@bf16",
        "m@01@0@00@bf16",
        "m@-1@0@00@bf16",
        "m@1@0@00@bf16@3-3",
        "m@1@0@00@bf16@t=1@7",
        "m@1@0@00@bf16@a=b=c",
        "m m@1@0@00@bf16",
        "m%41@1@0@00@bf16",
        "m%4@1@0@00@bf16",
        "m%ff@1@0@00@bf16",
        "m@1@0@00@bf16\n",
    ],
)
def test_what_no_name_has_for_its_text_is_refused(text):
    with pytest.raises(ValueError, match=r"is not model@|another way"):
        parse_name(text)
