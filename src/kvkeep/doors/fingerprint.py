"""Hashes the content of weight files into one digest, and finds out whether they have changed since a moment.

Hashes each file once: it remembers digests by device, inode, size and times. In a hub's cache, where a file is a link
to a blob that has its SHA-256 as name, the name is the digest. Knows nothing about models or engines.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvkeep.home import cache_file

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_REMEMBERED = 4096
MAX_LINKS = 40  # as the kernel
TICK_NS = 10 * 10**6  # a file's time may be this far behind the clock
COARSE_NS = 2 * 10**9  # and this far on a file system that keeps whole seconds, or every second one


class Signature(NamedTuple):
    """What a file system changes when a file's content changes."""

    name: str
    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int


def signatures(folder: Path, suffixes: Iterable[str]) -> tuple[Signature, ...]:
    """List the signatures of a folder's files with these suffixes, by name; empty if none can be read."""
    found = []
    wanted = tuple(suffixes)
    try:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(wanted) and path.is_file():
                s = path.stat()
                found.append(
                    Signature(path.name, s.st_dev, s.st_ino, s.st_size, mtime_ns=s.st_mtime_ns, ctime_ns=s.st_ctime_ns)
                )
    except OSError:
        return ()
    return tuple(found)


def fingerprint(
    folder: Path, suffixes: Iterable[str], memory: Path | None, now_ns: Callable[[], int] = time.time_ns
) -> str | None:
    """Return the SHA-256 (hex) over the sorted (name, size, content digest) of the files; None if one cannot be read.

    `memory` is a file that remembers the digests of files that did not change just now.
    """
    files = signatures(folder, suffixes)
    if not files:
        return None
    known = _remembered(memory)
    digest = hashlib.sha256()
    fresh: dict[str, str] = {}
    try:
        for file in files:
            tag = ":".join(str(part) for part in file[1:])
            content = known.get(tag) or _content(folder / file.name)
            if _at_latest_ns(file.mtime_ns, file.ctime_ns) < now_ns():
                fresh[tag] = content
            digest.update(json.dumps([file.name, file.nbytes, content]).encode())
    except OSError:
        return None
    if fresh.keys() - known.keys():
        _remember(memory, {**known, **fresh})
    return digest.hexdigest()


def changed_since(folder: Path, suffixes: Iterable[str], start_ns: int) -> Path | None:
    """Return the path through which these files may have changed since `start_ns`; None if there is none.

    That is a file, the folder, or on the way to them a switched link or a renamed folder; also a path that cannot be
    read. Times are the file system's: its clock must not be behind this machine's.
    """
    wanted = tuple(suffixes)
    name, final = folder, Path(os.path.realpath(folder))
    try:
        files = [path for path in sorted(folder.iterdir()) if path.name.endswith(wanted)]
        for path in (folder, *files):
            for name in _way(path):
                s = os.lstat(name)
                # an entry made in a folder on the way changes both its times alike, a new name only the second
                passed = stat.S_ISDIR(s.st_mode) and s.st_mtime_ns == s.st_ctime_ns and name != final
                if _at_latest_ns(s.st_mtime_ns, s.st_ctime_ns) >= start_ns and not passed:
                    return name
    except OSError:
        return name
    return None


def process_start_ns() -> int:
    """Return when this process began, by the clock from which file systems take their times."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - age_ns


def _at_latest_ns(*times_ns: int) -> int:
    """Return the latest moment at which something with these times may have changed."""
    return max(time_ns + (TICK_NS if time_ns % 10**9 else COARSE_NS) for time_ns in times_ns)


def _way(path: Path) -> Iterator[Path]:
    """Yield every name on the way from the root to `path`, links and their targets among them."""
    here, ahead, links = Path("/"), list(path.absolute().parts[:0:-1]), 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = here.parent
            continue
        name = here / part
        yield name
        if not name.is_symlink():
            here = name
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, "too many links", str(name))
        target = name.readlink()
        here = Path("/") if target.is_absolute() else here
        ahead += [part for part in target.parts[::-1] if part != "/"]


def default_memory() -> Path | None:
    """Return the file that remembers this user's digests; None for a user without a home directory."""
    return cache_file("fingerprints.json")


def _content(path: Path) -> str:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            yield piece


def _remembered(memory: Path | None) -> dict[str, str]:
    if memory is None:
        return {}
    try:
        read = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    known = read.items() if isinstance(read, dict) else ()
    return {str(tag): content for tag, content in known if isinstance(content, str) and _SHA256.fullmatch(content)}


def _remember(memory: Path | None, known: dict[str, str]) -> None:
    if memory is None:
        return
    newest = dict(list(known.items())[-MAX_REMEMBERED:])
    try:
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
            json.dump(newest, file)
        os.replace(file.name, memory)
    except OSError:
        return  # it is only a shortcut
