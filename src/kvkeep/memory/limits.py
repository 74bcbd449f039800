"""Whether the machine has room for a pool, decided before anything is allocated.

Knows nothing about regions, chunks or where the pool's size came from. Memory that a control group does not
grant is no error later but the end of the process (the kernel kills it), so the answer comes at the start.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

STORE_NBYTES = 100 << 20  # what a store takes beside its pool, threads and buffers of its disk tier included
_MIB = 1 << 20
_GIB = 1 << 30
_UNITS = ((1 << 40, "TiB"), (_GIB, "GiB"), (_MIB, "MiB"), (1 << 10, "KiB"))
_UNLIMITED_NBYTES = 1 << 60  # v1 writes "no limit" as a huge number


class Limit(msgspec.Struct, frozen=True):
    """What one file of the system grants and how much of it is in use, in bytes."""

    file: str
    bound_nbytes: int
    used_nbytes: int

    @property
    def available_nbytes(self) -> int:
        """What is left under this limit, never negative."""
        return max(0, self.bound_nbytes - self.used_nbytes)


class MemoryLimits(msgspec.Struct, frozen=True):
    """All limits that bind this process's memory."""

    limits: tuple[Limit, ...]

    @property
    def tightest(self) -> Limit | None:
        """The limit that leaves least; None where none could be read."""
        return min(self.limits, key=lambda limit: limit.available_nbytes, default=None)

    @property
    def available_nbytes(self) -> int:
        """What the tightest limit leaves; 0 where none could be read, so that "auto" stays small."""
        return 0 if self.tightest is None else self.tightest.available_nbytes


def check_room(nbytes: int, limits: MemoryLimits | None = None, beside_nbytes: int = STORE_NBYTES) -> None:
    """Raise ConfigError when a pool of `nbytes` does not fit, naming the limit, its numbers and the cure.

    `beside_nbytes` must be left for the rest of the store's process: all of it where that is not started yet.
    The pool is a memfd. It lives on the kernel's own mount of tmpfs and not on /dev/shm, so the size of
    /dev/shm (64 MiB in a container by default) does not bind it; free memory and the control groups do.
    For a pool that is a named file, pass `read_limits(named_in=folder)`.
    """
    tightest = (read_limits() if limits is None else limits).tightest
    if tightest is not None and nbytes > tightest.available_nbytes - beside_nbytes:
        raise ConfigError(_refusal(nbytes, tightest, beside_nbytes))


def still_beside_nbytes(root: Path = Path("/")) -> int:
    """What this process, which becomes a store, will still take beside its pool: it has the rest already."""
    fields = _read(root / "proc/self/statm").split()
    resident_nbytes = int(fields[1]) * mmap.PAGESIZE if len(fields) > 1 else 0
    return max(0, STORE_NBYTES - resident_nbytes)


def read_limits(root: Path = Path("/"), named_in: Path | None = None) -> MemoryLimits:
    """Read the machine's free memory, this process's control groups, and the folder's file system.

    `root` is where proc and sys are found; files that are not there bind nothing.
    """
    return MemoryLimits((*_machine(root), *_control_groups(root), *_folder(named_in)))


def size_text(nbytes: int) -> str:
    """Say a size for people, rounded down to what `pool_size` reads back: "1.5 TiB", "3.1 GiB", "96 MiB"."""
    for unit_nbytes, name in _UNITS[:2]:
        if nbytes >= unit_nbytes:
            return f"{nbytes * 10 // unit_nbytes / 10:.1f} {name}"
    return f"{nbytes // _MIB} MiB"


def amount_text(nbytes: int) -> str:
    """Say an amount for people, to two places of the unit that suits it: "1.00 GiB", "0.50 KiB", "-2.00 MiB"."""
    unit_nbytes, name = next((unit for unit in _UNITS if abs(nbytes) >= unit[0]), _UNITS[-1])
    return f"{nbytes / unit_nbytes:.2f} {name}"


def _refusal(nbytes: int, limit: Limit, beside_nbytes: int) -> str:
    largest = limit.available_nbytes - beside_nbytes
    cure = f"set pool_size to at most {size_text(largest)}" if largest >= _MIB else "free memory"
    return (
        f"pool_size: a pool of {amount_text(nbytes)} does not fit, and {amount_text(beside_nbytes)} beside it for the "
        f"store itself: {limit.file} leaves {amount_text(limit.available_nbytes)} ({amount_text(limit.bound_nbytes)}, "
        f"of which {amount_text(limit.used_nbytes)} are in use); {cure}, or raise that limit"
    )


def _machine(root: Path) -> Iterator[Limit]:
    file = root / "proc/meminfo"
    fields = dict(line.split(":", 1) for line in _read(file).splitlines() if ":" in line)
    if "MemTotal" in fields and "MemAvailable" in fields:
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        yield Limit(f"{file} (MemAvailable)", total, total - available)


def _control_groups(root: Path) -> Iterator[Limit]:
    """Yield the limits of every group from this process's own up to the mount's root, in both versions."""
    own = dict(_own_paths(root))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        kind, options = source.split(" ")[0], source.split(" ")[-1].split(",")
        if kind == "cgroup2" and "" in own:
            own_path, read = own[""], _limits_v2
        elif kind == "cgroup" and "memory" in options and "memory" in own:
            own_path, read = own["memory"], _limits_v1
        else:
            continue
        inside, mounted_at = (Path(_unescape(field)) for field in mount.split(" ")[3:5])
        for group in _groups(root / mounted_at.relative_to("/"), inside, Path(own_path)):
            yield from read(group)


def _own_paths(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (controller, path) of this process; version 2 has the controller ""."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _groups(mounted_at: Path, inside: Path, own: Path) -> Iterator[Path]:
    """Yield the folders from the own group's up to the mount's.

    In a container the path may be the host's and not below what is mounted here; the mount itself is then the
    closest group that can be seen.
    """
    visible = own.is_relative_to(inside) and ".." not in own.parts
    group = mounted_at / own.relative_to(inside) if visible else mounted_at
    while group != mounted_at:
        yield group
        group = group.parent
    yield mounted_at


def _limits_v2(group: Path) -> Iterator[Limit]:
    """Yield memory.max (past it the process is killed) and memory.high (past it the kernel stalls it)."""
    used = _number(group / "memory.current")
    cached = _file_cache(group, ("active_file", "inactive_file"))
    for file in (group / "memory.max", group / "memory.high"):
        bound = _number(file)
        if bound is not None and used is not None:
            yield Limit(str(file), bound, max(0, used - cached))


def _limits_v1(group: Path) -> Iterator[Limit]:
    file = group / "memory.limit_in_bytes"
    bound, used = _number(file), _number(group / "memory.usage_in_bytes")
    cached = _file_cache(group, ("total_active_file", "total_inactive_file"))
    if bound is not None and used is not None and bound < _UNLIMITED_NBYTES:
        yield Limit(str(file), bound, max(0, used - cached))


def _file_cache(group: Path, names: tuple[str, str]) -> int:
    """Count the bytes of cached files: usage includes them, but the kernel gives them up first.

    MemAvailable does the same. Without this a group that has just read a model's weights would look full.
    """
    pairs = (line.split() for line in _read(group / "memory.stat").splitlines())
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _folder(named_in: Path | None) -> Iterator[Limit]:
    if named_in is not None:
        found = os.statvfs(named_in)
        bound = found.f_blocks * found.f_frsize
        yield Limit(str(named_in), bound, bound - found.f_bavail * found.f_frsize)


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None  # "max" and a missing file bind nothing


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _unescape(field: str) -> str:
    r"""Undo mountinfo's octal escapes of blanks (\040, \011, \012, \134)."""
    for code in ("040", "011", "012", "134"):
        field = field.replace("\\" + code, chr(int(code, 8)))
    return field
