"""Makes the Unix socket of a shared store, in a folder that only its user can enter.

Removes nothing but the socket of a store that is gone. Knows nothing about what clients send.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from kvkeep.errors import ConfigError

MAX_PATH_NBYTES = 107  # sockaddr_un holds 108 with the closing zero
ANSWER_LIMIT_S = 1.0
_CURE = (
    "name a path in a folder that belongs to the store's user alone (one that is missing is made), "
    "as $XDG_RUNTIME_DIR/kvkeep/store; systemd makes one in /run by RuntimeDirectory=kvkeep, RuntimeDirectoryMode=0700"
)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, 0600 in a folder that is 0700 (made where it is missing).

    Replaces the socket of a store that is gone. ConfigError, with what to do, if a store answers there, if something
    else has that name, if others can enter the folder, and if the system refuses.
    """
    length = len(os.fsencode(path))
    if length > MAX_PATH_NBYTES:
        raise ConfigError(f"a socket's path has at most {MAX_PATH_NBYTES} bytes; {path} has {length}: {_CURE}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(path.parent.stat().st_mode) & 0o077:
            raise ConfigError(f"{path.parent} can be entered by others: {_CURE}")
        _make_way(path)
        return _bound(path)
    except OSError as error:
        raise ConfigError(f"no store can listen at {path}: {error}: {_CURE}") from error


def unlink_own(path: Path, own: os.stat_result) -> None:
    """Removes the socket `own` if `path` still names it. Never fails."""
    try:
        if os.path.samestat(path.lstat(), own):
            path.unlink()
    except OSError:
        return


def _make_way(path: Path) -> None:
    """Removes the socket of a store that is gone; ConfigError for anything else of that name."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is no socket and stays as it is: choose another path for the store's")
    if _answers(path):
        raise ConfigError(f"a store answers at {path} already: stop it first, or choose another path")
    path.unlink()


def _answers(path: Path) -> bool:
    """Whether a store listens, also one that accepts nobody at this moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_LIMIT_S)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):
            return True
    return True


def _bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock
