"""Asking a running store about itself: a control session, which uses none of the store's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvkeep.errors import StoreGone
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.messages import Control, Stats
from kvkeep.wire.start import join_shared

ANSWER_LIMIT_S = 5.0


@contextmanager
def control_session(path: str, name: str) -> Iterator[Client]:
    """A session of a tool with this name, with the store at a socket; StoreGone or WireError if there is none."""
    client = Joining(join_shared(path, ANSWER_LIMIT_S), Control(name=name)).wait(ANSWER_LIMIT_S)
    try:
        yield client
    finally:
        client.close()


def ask_stats(path: str, check: bool) -> Stats:
    """What the store at a socket holds and did; with `check` it first proves that its index adds up.

    StoreGone if it does not answer.
    """
    with control_session(path, "kvkeep stats") as client:
        answer = client.wait(client.stats(check), ANSWER_LIMIT_S)
        if not isinstance(answer, Stats):
            why = client.why_gone or f"it did not answer within {ANSWER_LIMIT_S:.0f} s"
            raise StoreGone(f"the store at {path} said nothing: {why}")
    return answer
