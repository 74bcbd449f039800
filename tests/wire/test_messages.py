"""Messages: what is encoded comes back; any bytes are a message or a WireError."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.errors import WireError
from kvkeep.telemetry import Figure, Miss
from kvkeep.wire import messages as m

SENT: list[m.ToStore] = [
    m.Hello(
        version=1,
        name="n",
        namespace=b"n" * 16,
        identity="{}",
        chunk_nbytes=4096,
        holders=[1, 2],
        verify_every=64,
        resumes=7,
        sizes=[4096],
        state_sizes=[],
    ),
    m.Fetch(call=1, digests=b"d" * 64, deadline_s=0.5, limit_s=1.0, early=True),
    m.Reserve(2, b""),
    m.Commit(3, 9, [0, 1], [b"s", b""]),
    m.Release(9),
    m.Discard(b"d" * 32),
    m.Clear(4, True),
    m.Rename(b"n" * 16, "{}"),
    m.AskStats(5, True),
    m.Bye(),
    m.Control(name="kvkeep stats"),
]
ANSWERS: list[m.FromStore] = [
    m.Welcome(version=1, boot=b"b" * 16, session=3, pid=44, pool_nbytes=1 << 40),
    m.Matched(
        call=1,
        lease=m.StoreLease(b"b" * 16, 2),
        offsets=[0, 4096],
        sums={1: b"s"},
        sources={"pool": 1, "disk": 1},
        why=Miss.TIER_LATE,
        took_s=0.1,
        state=m.HeldState(m.StoreLease(b"b" * 16, 3), 8192, b"", "disk"),
        progress={1: 1 << 30},
    ),
    m.Granted(2, m.StoreLease(b"b" * 16, 3), [m.PRESENT, m.BUSY, m.NO_ROOM, 0]),
    m.Committed(3, [True, False], 8192, 0),
    m.Cleared(4, 5, "why"),
    m.Stats(
        call=5,
        rows=[Figure("chunks", "", 1), Figure("failures", "disk", 2)],
        problem="no",
        known=[m.Known(b"n" * 16, "vllm m", "model  'm'", 3)],
        out={"disk": "why"},
    ),
    m.Refused("wire", "why"),
]
DECODERS: list[Callable[[bytes], Any]] = [m.decoded_by_store, m.decoded_by_client]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=9) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@pytest.mark.parametrize("message", SENT, ids=lambda one: type(one).__name__)
def test_what_a_client_sends_comes_back(message: m.ToStore) -> None:
    assert m.decoded_by_store(m.encoded(message)) == message
    with pytest.raises(WireError, match="not a message"):
        m.decoded_by_client(m.encoded(message))


@pytest.mark.parametrize("message", ANSWERS, ids=lambda one: type(one).__name__)
def test_what_a_store_sends_comes_back(message: m.FromStore) -> None:
    assert m.decoded_by_client(m.encoded(message)) == message
    with pytest.raises(WireError, match="not a message"):
        m.decoded_by_store(m.encoded(message))


def only_a_message_or_an_error(payload: bytes) -> None:
    for decode in DECODERS:
        try:
            message = decode(payload)
        except WireError:
            continue
        assert isinstance(message, m.ToStore | m.FromStore)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
@example(b"")
@example(b"\x91" * 100_000)
def test_any_bytes(payload: bytes) -> None:
    only_a_message_or_an_error(payload)


@settings(max_examples=200, deadline=None)
@given(st.integers(-1, 20), st.lists(PLAIN, max_size=8))
def test_any_messagepack(tag: int, fields: list[Any]) -> None:
    only_a_message_or_an_error(msgspec.msgpack.encode([tag, *fields]))


@settings(max_examples=150, deadline=None)
@example(SENT[0], 4, 0x80, 0)
@given(st.sampled_from([*SENT, *ANSWERS]), st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_any_damage_to_a_message(message: Any, place: int, byte: int, cut: int) -> None:
    payload = bytearray(m.encoded(message))
    payload[place % len(payload)] = byte
    only_a_message_or_an_error(bytes(payload))
    only_a_message_or_an_error(bytes(payload[: cut % len(payload)]))


@given(st.integers(0, 5), st.integers(0, 31))
def test_digests_travel_as_one_piece(count: int, rest: int) -> None:
    digests = [bytes([n]) * 32 for n in range(count)]
    if rest:
        with pytest.raises(WireError, match="not a whole number of digests"):
            m.split_digests(b"".join(digests) + bytes(rest))
    else:
        assert m.split_digests(b"".join(digests)) == digests


@pytest.mark.parametrize("start", [b"\x90", b"\x01\x08"], ids=["garbage", "a hello"])
def test_the_version_is_read_without_making_objects_of_what_follows(start: bytes) -> None:
    count = 1 << 19
    payload = b"\xdd" + (count + len(start)).to_bytes(4, "big") + start + count * b"\x90"  # empty lists
    tracemalloc.start()
    try:
        assert m.version_in(payload) == (8 if start == b"\x01\x08" else None)
        _, most_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_nbytes < 1 << 20, "who says hello so must not take the store's memory, nor the others' time"
