"""The end of a store while something that a client asked for is under way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store
from kvkeep.testing.doubles.gate_tier import GateTier, ManualLoop
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining

CHUNK, NAMESPACE, DIGESTS = 4096, b"n" * 16, [bytes([n]) * 32 for n in range(2)]


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    loop = ManualLoop()
    yield loop
    loop.close()


def test_what_is_being_read_at_the_end_is_settled_though_nobody_hears_of_it(loop: ManualLoop) -> None:
    store = Store(Index(FreeList(4 * CHUNK), policy_by_name("lru")), 4 * CHUNK, max_pinned_share=1.0)
    walk, tier = TierWalk(store, np.zeros(4 * CHUNK, np.uint8)), GateTier(shut={"load"})
    walk.add("disk", tier)
    for digest in DIGESTS:
        tier.keep(NAMESPACE + digest, bytes(CHUNK), bytes(16))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pool_fd = os.memfd_create("pool")
    server = Server(walk, bytes(16), pool_fd, theirs)
    serving = loop.create_task(server.serve())
    joining = Joining(
        ours,
        m.Hello(
            name="engine", namespace=NAMESPACE, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()], sizes=[CHUNK]
        ),
    )
    loop.turn()
    client = joining.poll()
    assert client is not None
    client.fetch(DIGESTS, deadline_s=5.0)
    loop.turn()
    assert [verb for verb, _ in tier.calls] == ["contains", "load"]
    server.stop()
    loop.turn()
    assert serving.done()
    tier.open("load")
    loop.turn()
    assert store.figures()["chunks"] == 2
    assert store.figures()["writing_nbytes"] == 0
    client.drop()
    os.close(pool_fd)
