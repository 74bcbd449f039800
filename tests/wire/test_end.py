"""What a client asked for and is still under way: it holds up nothing else, and the end of the store loses nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

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
from kvkeep.wire.client import Client, Joining

CHUNK, NAMESPACE, DIGESTS = 4096, b"n" * 16, [bytes([n]) * 32 for n in range(2)]


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    loop = ManualLoop()
    yield loop
    loop.close()


@dataclass
class Scene:
    """A server in a loop with its own time, its store over one tier that keeps two chunks, and a client."""

    loop: ManualLoop
    tier: GateTier
    store: Store
    server: Server
    client: Client
    serving: asyncio.Task[None]


@pytest.fixture
def scene(loop: ManualLoop) -> Iterator[Scene]:
    store = Store(Index(FreeList(4 * CHUNK), policy_by_name("lru")), 4 * CHUNK, max_pinned_share=1.0)
    walk, tier = TierWalk(store, np.zeros(4 * CHUNK, np.uint8)), GateTier()
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
    yield Scene(loop, tier, store, server, client, serving)
    server.stop()
    loop.turn()
    client.drop()
    os.close(pool_fd)


def test_what_is_being_read_at_the_end_is_settled_though_nobody_hears_of_it(scene: Scene) -> None:
    scene.tier.shut.add("load")
    scene.client.fetch(DIGESTS, deadline_s=5.0)
    scene.loop.turn()
    assert [verb for verb, _ in scene.tier.calls] == ["contains", "load"]
    scene.server.stop()
    scene.loop.turn()
    assert scene.serving.done()
    scene.tier.open("load")
    scene.loop.turn()
    assert scene.store.figures()["chunks"] == 2
    assert scene.store.figures()["writing_nbytes"] == 0


def test_a_client_that_has_gone_leaves_nothing_pinned_and_its_read_to_others(scene: Scene) -> None:
    scene.tier.shut.add("load")
    scene.client.fetch(DIGESTS, deadline_s=5.0)
    scene.loop.turn()
    (session,) = scene.store.sessions.values()
    assert session.promised_nbytes == 2 * CHUNK
    scene.client.drop()
    scene.loop.turn()
    assert session.promised_nbytes == 0
    scene.tier.open("load")
    scene.loop.turn()
    figures = scene.store.figures()
    assert (figures["chunks"], figures["pinned_nbytes"], figures["writing_nbytes"]) == (2, 0, 0)


def test_discards_that_a_disk_does_not_do_hold_up_no_lookup_and_go_on_in_one_call(scene: Scene) -> None:
    scene.tier.shut.add("delete")
    others = [bytes([number]) * 32 for number in range(100, 110)]
    for digest in others:
        scene.client.discard([digest])
    call = scene.client.fetch(DIGESTS, deadline_s=5.0)
    scene.loop.turn()
    scene.client.pump()
    answer = call.answer
    assert isinstance(answer, m.Matched)
    assert len(answer.offsets) == 2
    scene.tier.open("delete")
    scene.loop.turn()
    deleted = [keys for verb, keys in scene.tier.calls if verb == "delete"]
    assert len(deleted) == 2
    assert [key[16:] for keys in deleted for key in keys] == others
