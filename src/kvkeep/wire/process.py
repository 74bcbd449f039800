"""Starting the store process, joining one that runs, and being one.

A private store inherits one end of a socket pair and ends with its file; a shared one listens on a Unix socket.
Knows nothing about engines. The process imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvkeep.config import Config
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policy import policy_by_name
from kvkeep.errors import ConfigError, StoreGone
from kvkeep.memory.region import Region
from kvkeep.memory.room import check_room, size_text, still_beside_nbytes
from kvkeep.memory.words import region_nbytes, words_behind
from kvkeep.store.store import Store
from kvkeep.store.walk import TierWalk
from kvkeep.tiers.holding import DiskOptions
from kvkeep.tiers.open import disk_options, open_tiers
from kvkeep.wire.identities import Identities
from kvkeep.wire.listening import listen, unlink_own
from kvkeep.wire.peer import credentials_of
from kvkeep.wire.server import Server
from kvkeep.wire.systemd import notify

log = logging.getLogger("kvkeep.store")

POPULATE_PIECE_NBYTES = 16 << 20
POPULATE_SAY_S = 2.0
END_LIMIT_S = 5.0
DRAIN_S = 8.0  # what an ending store still writes; whoever waits for its end must wait longer


@dataclass(frozen=True)
class StoreOptions:
    """What a store process needs to know; the fields mean what the settings of these names mean."""

    pool_nbytes: int
    policy: str = "lru"
    max_pinned_share: float = 0.5
    lease_time_s: float = 60.0
    log_level: str = "info"
    disk: DiskOptions | None = None

    def arguments(self) -> list[str]:
        """The command line that `kvkeep.wire.__main__` reads."""
        return [
            f"--pool-nbytes={self.pool_nbytes}",
            f"--policy={self.policy}",
            f"--max-pinned-share={self.max_pinned_share}",
            f"--lease-time-s={self.lease_time_s}",
            f"--log-level={self.log_level}",
            *([f"--disk={msgspec.json.encode(self.disk).decode()}"] if self.disk is not None else []),
        ]


def store_options(config: Config, pool_nbytes: int) -> StoreOptions:
    """What the settings say of a store with a pool of this size."""
    return StoreOptions(
        pool_nbytes=pool_nbytes,
        policy=config.policy,
        max_pinned_share=config.max_pinned_share,
        lease_time_s=config.lease_time_s,
        log_level=config.log_level,
        disk=disk_options(config),
    )


@dataclass
class Child:
    """A private store: its process and our end of the socket pair."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    def end(self, limit_s: float) -> None:
        """Closes our end, waits at most `limit_s` for the process, then kills it (by its pid, it is ours)."""
        self.sock.close()
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(limit_s)

    def kill(self) -> None:
        """Ends the process at once and does not wait for it: a large pool takes a while to go."""
        self.sock.close()
        self.process.kill()
        threading.Thread(target=self.process.wait, daemon=True, name="kvkeep-reap").start()


def start_private(options: StoreOptions) -> Child:
    """Starts a store process as a child, after checking that the machine has room for its pool (ConfigError)."""
    check_room(options.pool_nbytes)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "kvkeep.wire", f"--fd={theirs.fileno()}", *options.arguments()]
    try:
        # its own session: Ctrl-C at the engine's terminal must not end the store before the engine
        process = subprocess.Popen(  # noqa: S603
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        ours.close()
        raise StoreGone(f"the store process could not be started: {error}") from error
    finally:
        theirs.close()
    return Child(process, ours)


def join_shared(path: str, limit_s: float) -> socket.socket:
    """A connection to the shared store at `path`.

    StoreGone if none answers there, ConfigError for one of another user: whoever runs a store can give wrong bytes.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(limit_s)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise StoreGone(
            f"no store answers at {path} ({error}): start one with `kvkeep serve --socket {path}`"
        ) from error
    owner = credentials_of(sock).uid
    if owner not in (os.getuid(), 0):
        sock.close()
        raise ConfigError(
            f"store: the store at {path} is run by user {owner} and not by this user ({os.getuid()}) or root, so that "
            "what it gives cannot be trusted; join one that you run, or run both as one user"
        )
    return sock


def write_log(level: str) -> None:
    """Writes the store process's lines of this level and above to stderr, with the time as vLLM writes it."""
    form = "kvkeep store %(process)d %(levelname)s %(asctime)s %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%m-%d %H:%M:%S")


def run(options: StoreOptions, private_fd: int | None, path: Path | None) -> None:
    """Is the store process: makes the pool and serves until its client is gone (private) or it is told to stop."""
    check_room(options.pool_nbytes, beside_nbytes=still_beside_nbytes())
    _allow_descriptors()
    with Region.create(region_nbytes(options.pool_nbytes)) as region:
        index = Index(FreeList(options.pool_nbytes), policy_by_name(options.policy))
        store = Store(index, options.pool_nbytes, options.max_pinned_share, options.lease_time_s)
        private = socket.socket(fileno=private_fd) if private_fd is not None else None
        listener = listen(path) if path is not None else None
        own = path.lstat() if path is not None else None
        walk = TierWalk(store, region.array, words_behind(region))
        server = Server(walk, secrets.token_bytes(16), region.fd, private, listener)
        closing = threading.Event()
        populating = threading.Thread(target=_populate, args=(region, store, closing), daemon=True, name="populate")
        log.info("pool of %s, policy %s, pid %d", size_text(options.pool_nbytes), options.policy, os.getpid())
        populating.start()
        try:
            serve_to_the_end(server, _opened(options.disk, server.walk), DRAIN_S)
        finally:
            closing.set()
            if path is not None and own is not None:
                unlink_own(path, own)
            populating.join(END_LIMIT_S)  # it must not meet a closed region


async def _opened(disk: DiskOptions | None, walk: TierWalk) -> None:
    """Opens the tiers; in a directory that is ours, also what its namespaces are in words."""
    walk.promotions.opening = disk is not None
    try:
        await open_tiers(disk, walk.admit, walk.left_out)
    finally:
        walk.promotions.opening = False
    if disk is not None and walk.loads:
        directory = Path(disk.directories[0])
        Identities(directory, walk.store.namespaces).start(asyncio.get_running_loop())


def serve_to_the_end(server: Server, opening: Coroutine[None, None, None], drain_s: float) -> None:
    """Serves until the end, which SIGTERM and SIGINT are too; `opening` opens the tiers meanwhile.

    Then what waits to be written is written, for at most `drain_s` seconds. The loop is left as it is: to close it well
    is to wait for a device that may hang.
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
    """Raises the soft limit to the hard one: a store has one descriptor a client and one a process of its session."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _populate(region: Region, store: Store, closing: threading.Event) -> None:
    """Allocates the pool's pages from the low end, which the allocator lends first; a copy into fresh pages is slow.

    If memory runs out the store stops lending rather than let a worker's copy be killed.
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
