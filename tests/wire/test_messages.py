"""Messages: what is encoded comes back; any bytes are a message or a WireError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.errors import WireError
from kvkeep.wire import messages as m

SENT: list[m.ToStore] = [
    m.Hello(1, "n", b"n" * 16, "{}", 4096, [1, 2], 64, 7),
    m.Fetch(1, b"d" * 64, 0.5, 1.0, True),
    m.Reserve(2, b""),
    m.Commit(3, 9, [0, 1], [b"s", b""]),
    m.Release(9),
    m.Discard(b"d" * 32),
    m.Clear(4, True),
    m.Rename(b"n" * 16, "{}"),
    m.AskStats(5, True),
    m.Bye(),
]
ANSWERS: list[m.FromStore] = [
    m.Welcome(1, b"b" * 16, 3, 44, 1 << 40),
    m.Matched(1, 2, [0, 4096], {1: b"s"}, {"pool": 1, "disk": 1}, "absent", 0.1, None, {1: 1 << 30}),
    m.Granted(2, 3, [m.PRESENT, m.BUSY, m.NO_ROOM, 0]),
    m.Committed(3, [True, False], 8192, 0),
    m.Cleared(4, 5, "why"),
    m.Stats(5, {"chunks": 1}, "no", [m.Known(b"n" * 16, "vllm m", "model  'm'", 3)], {"disk": "why"}),
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
