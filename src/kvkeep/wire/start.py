"""Starts a store process of the engine's own, or joins one that runs.

A private store inherits one end of a socket pair, and ends when the other end is closed. A shared store listens at a
Unix socket. Knows nothing about engines, or about what a store does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass

from kvkeep.config import Config
from kvkeep.errors import ConfigError, StoreGone
from kvkeep.memory.limits import check_room, read_limits
from kvkeep.wire.processes import credentials_of

DRAIN_S = 8.0  # how long an ending store may still write to its tiers; a wait for its end must be longer


@dataclass
class Child:
    """A private store: its process and our end of the socket pair."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    def end(self, limit_s: float) -> None:
        """Closes our end, waits at most `limit_s` for the process, then kills it."""
        self.sock.close()
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(limit_s)

    def kill(self) -> None:
        """Kills the process and does not wait for its end: the kernel takes a while to free a large pool."""
        self.sock.close()
        self.process.kill()
        threading.Thread(target=self.process.wait, daemon=True, name="kvkeep-reap").start()


def start_private(config: Config) -> Child:
    """Starts a store process as a child, after checking that the machine has room for its pool (ConfigError)."""
    check_room(config.pool_nbytes(read_limits().available_nbytes))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "kvkeep.store", f"--fd={theirs.fileno()}", f"--options={config.json()}"]
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
