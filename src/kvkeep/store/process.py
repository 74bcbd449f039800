"""The store process: its pool, its server and its tiers, from the start to the last write.

A private store inherits one end of a socket pair and ends when the other end is closed; a shared one listens on a Unix
socket. Knows nothing about engines, and imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path

from kvkeep.config import Config, Disk, Tier
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.errors import ConfigError
from kvkeep.memory.limits import check_room, read_limits, size_text, still_beside_nbytes
from kvkeep.memory.progress import region_nbytes, table_of
from kvkeep.memory.region import Region
from kvkeep.store.below.tiers import TierWalk
from kvkeep.store.identities import Identities
from kvkeep.store.server.listening import listen, unlink_own
from kvkeep.store.server.server import Server
from kvkeep.store.store import Store
from kvkeep.store.systemd import notify
from kvkeep.tiers.open import open_tiers

log = logging.getLogger("kvkeep.store")

POPULATE_PIECE_NBYTES = 16 << 20
POPULATE_SAY_S = 2.0
END_LIMIT_S = 5.0
DRAIN_S = 8.0  # for the last writes of an ending store; whoever waits for its end must wait longer


def write_log(level: str) -> None:
    """Log lines of this level and above to stderr, with the time as vLLM writes it."""
    form = "kvkeep store %(process)d %(levelname)s %(asctime)s %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%m-%d %H:%M:%S")


def run(config: Config, private_fd: int | None, path: Path | None) -> None:
    """Make the pool and serve until SIGTERM or SIGINT, or (private) until the client has gone."""
    pool_nbytes = config.pool_nbytes(read_limits().available_nbytes)
    check_room(pool_nbytes, beside_nbytes=still_beside_nbytes())
    _allow_descriptors()
    with Region.create(region_nbytes(pool_nbytes)) as region:
        index = Index(FreeList(pool_nbytes), policy_by_name(config.policy))
        store = Store(index, pool_nbytes, config.max_pinned_share, config.lease_time_s)
        private = socket.socket(fileno=private_fd) if private_fd is not None else None
        listener = listen(path) if path is not None else None
        own = path.lstat() if path is not None else None
        walk = TierWalk(store, region.array, table_of(region))
        server = Server(walk, secrets.token_bytes(16), region.fd, private, listener=listener)
        closing = threading.Event()
        populating = threading.Thread(target=_populate, args=(region, store, closing), daemon=True, name="populate")
        log.info("pool of %s, policy %s, pid %d", size_text(pool_nbytes), config.policy, os.getpid())
        populating.start()
        try:
            serve_to_the_end(server, _open(config.tiers, server.walk), DRAIN_S)
        finally:
            closing.set()
            if path is not None and own is not None:
                unlink_own(path, own)
            populating.join(END_LIMIT_S)  # it must not meet a closed region


async def _open(tiers: Sequence[Tier], walk: TierWalk) -> None:
    """Open the tiers, then the file of namespaces in the disk's first directory."""
    walk.filler.opening = bool(tiers)
    try:
        await open_tiers(tiers, walk.admit, walk.left_out)
    finally:
        walk.filler.opening = False
    disk = next((tier for tier in tiers if isinstance(tier, Disk)), None)
    if disk is not None and walk.reads:
        Identities(Path(disk.path[0]), walk.store.namespaces).start(asyncio.get_running_loop())


def serve_to_the_end(server: Server, opening: Coroutine[None, None, None], drain_s: float) -> None:
    """Serve until the server ends, or SIGTERM or SIGINT; `opening` opens the tiers meanwhile.

    Then write what waits to be written, for at most `drain_s` seconds. The loop is not closed: that would wait for a
    device that may hang.
    """
    loop = asyncio.new_event_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    task = loop.create_task(opening)
    notify("READY=1", os.environ)
    loop.run_until_complete(server.serve())
    notify("STOPPING=1", os.environ)
    task.cancel()
    chunks = server.store.figures()["chunks"]
    left = loop.run_until_complete(server.walk.aclose(drain_s))
    level = logging.WARNING if left.lost else logging.INFO
    what = "ended: the pool had %d chunks, %d of them were written nowhere and are dropped"
    log.log(level, what, chunks, left.no_tier)


def _allow_descriptors() -> None:
    """Raise the soft limit to the hard one: a store has a descriptor for each client and each of its processes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _populate(region: Region, store: Store, closing: threading.Event) -> None:
    """Allocate the pool's pages in the order in which the allocator lends them, since a copy into fresh pages is slow.

    If memory runs out the store stops lending: else a worker's copy would be killed.
    """
    began_s = said_s = time.monotonic()
    for start in range(0, region.nbytes, POPULATE_PIECE_NBYTES):
        if closing.is_set():
            return
        try:
            region.populate(start, min(POPULATE_PIECE_NBYTES, region.nbytes - start))
        except ConfigError as error:
            store.lending = False
            log.error("nothing new is stored: %s", error)
            return
        if time.monotonic() - said_s > POPULATE_SAY_S:
            said_s = time.monotonic()
            _say(f"populating the pool: {100 * start // region.nbytes} %, {said_s - began_s:.0f} s")
    _say(f"the pool is populated: {size_text(store.pool_nbytes)} in {time.monotonic() - began_s:.1f} s")


def _say(text: str) -> None:
    log.info("%s", text)
    notify(f"STATUS={text}", os.environ)
