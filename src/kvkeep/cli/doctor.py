"""`kvkeep doctor`: can this machine run kvkeep, and if not, what to do about it.

Knows nothing about engines: it imports no torch, no vLLM and starts no store, so it answers in a second.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvkeep.cli.ask import ask_stats
from kvkeep.cli.plain import cell
from kvkeep.config import Config, Disk
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.memory.limits import MemoryLimits, check_room, read_limits, size_text
from kvkeep.memory.region import Region
from kvkeep.sources import load_config
from kvkeep.transfer.device.choice import default_file, kept_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PROBE_NBYTES = 64 << 20
_PIPED_WIDTH = 160  # nobody wraps a log for us
_OLDEST, _TOO_NEW = (3, 11), (3, 14)
_VLLM = ("0", "32")
_SHARED_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class Check(msgspec.Struct, frozen=True):
    """One row of the answer; `cure` is what to do about a problem, and "" where there is none."""

    name: str
    found: str
    cure: str = ""


def doctor(
    pool_size: Annotated[str | None, typer.Option(help='Check for this pool, as "4 GiB".')] = None,
    config: Annotated[str | None, typer.Option(help="Check this TOML file.")] = None,
) -> None:
    """Check this machine and the configuration; exit status 1 if something is wrong."""
    asked = {} if pool_size is None else {"pool_size": pool_size}
    defaults = load_config(asked, {}, command_line=True)
    settings, configured = check_config(asked | ({} if config is None else {"config_file": config}), defaults)
    checks = [
        check_python(sys.version_info[:2]),
        check_vllm(installed("vllm")),
        configured,
        check_policy(settings),
        *([check_early(settings)] if settings.early_loads else []),
        *([check_store(settings.socket_path)] if settings.socket_path is not None else []),
        check_memory(settings, read_limits()),
        *(check_disk(Path(directory), disk) for disk in settings.tiers for directory in disk.path),
        *([check_pages(_SHARED_PAGES)] if settings.tiers else []),
        check_sealing(),
        check_speed(time.perf_counter),
        *check_transfer(settings, default_file(), Path("/dev/nvidiactl").exists()),
    ]
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(as_table(checks))
    if any(check.cure for check in checks):
        raise typer.Exit(1)


def check_python(version: tuple[int, int]) -> Check:
    """Check that this Python (major, minor) is one that kvkeep is tested with."""
    found = f"{platform.python_implementation()} {version[0]}.{version[1]} on {platform.system()}"
    right = _OLDEST <= version < _TOO_NEW and platform.system() == "Linux"
    return Check("Python", found, "" if right else "use Python 3.11 to 3.13 on Linux")


def check_vllm(version: str | None) -> Check:
    """Check that the vLLM that is installed here, if any, is one that kvkeep plugs into."""
    if version is None:
        return Check("vLLM", "not installed here: only a store, or a program with an engine of its own")
    right = version.split(".")[:2] == list(_VLLM)
    return Check("vLLM", version, "" if right else f"pip install 'vllm=={'.'.join(_VLLM)}.*'")


def check_store(path: str) -> Check:
    """Check that the shared store that is configured answers; an engine starts without one and looks for it again."""
    name = f"store ({path})"
    try:
        figures = ask_stats(path, check=False).figures
    except KVKeepError as error:
        return Check(name, "none", str(error))
    held, pool = size_text(figures["committed_nbytes"]), size_text(figures["pool_nbytes"])
    return Check(name, f"{figures['chunks']:,} chunks, {held} of {pool}")


def installed(module: str) -> str | None:
    """The version of the distribution that a module is from (a build may have a name of its own), without importing it.

    None if it is not there.
    """
    if find_spec(module) is None:
        return None
    found = metadata.packages_distributions().get(module)
    return metadata.version(found[0]) if found else None


def check_config(options: Mapping[str, str], defaults: Config) -> tuple[Config, Check]:
    """Read the configuration from this command's options and the environment; `defaults` stand in for a wrong one."""
    try:
        config = load_config(options, os.environ, command_line=True)
    except ConfigError as error:
        return defaults, Check("configuration", f"wrong: {error}", "correct it; the other rows are about the defaults")
    return config, Check("configuration", "read without an error")


def check_policy(config: Config) -> Check:
    """What becomes of a request whose promised prefix does not come after all."""
    recompute = config.load_failure_policy == "recompute"
    found = (
        "computed again" if recompute else "as vLLM's kv_load_failure_policy says, which by itself fails the request"
    )
    return Check("a load that fails", found)


def check_early(config: Config) -> Check:
    """Check whether the other settings let a prefix on disk be promised before it is read."""
    why = config.early_refusal
    return Check("early_loads", f"none: {why}" if why else "where an engine can wait by layer for what is still read")


def check_memory(config: Config, limits: MemoryLimits) -> Check:
    """Check that the configured pool fits what the machine and its control groups leave."""
    nbytes = config.pool_nbytes(limits.available_nbytes)
    found = f"a pool of {size_text(nbytes)}, {size_text(limits.available_nbytes)} are available"
    try:
        check_room(nbytes, limits)
    except ConfigError as error:
        return Check("memory", found, str(error))
    return Check("memory", found)


def check_disk(directory: Path, disk: Disk) -> Check:
    """Check that a directory of the disk tier can be made or written, and that its share of the size fits."""
    name = f"disk ({directory})"
    try:
        return _disk(name, directory, disk)
    except OSError as error:
        return Check(
            name, f"cannot be looked at: {error}", "let this user into it, or set disk_path to another directory"
        )


def _disk(name: str, directory: Path, disk: Disk) -> Check:
    there = next(folder for folder in (directory, *directory.parents) if folder.exists())
    share = disk.size // len(disk.path)
    wanted = share + disk.min_free
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(
            name, "cannot be written", f"let this user write to {there}, or set disk_path to another directory"
        )
    total = sum(file.lstat().st_blocks * 512 for file in directory.rglob("*")) if directory.is_dir() else 0
    room = total + shutil.disk_usage(there).free
    found = f"{size_text(share)} wanted, {size_text(room)} free or kvkeep's own"
    return Check(name, found, "" if wanted <= room else "set disk_size or disk_min_free lower, or free some space")


def check_pages(file: Path) -> Check:
    """Say in which pages the pool's memory comes by `file`, the kernel's; small ones cost speed and are no problem."""
    name = "huge pages"
    try:
        chosen = file.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return Check(name, "none: this kernel has none for shared memory")
    if chosen in ("never", "deny"):
        slow = f"{chosen}: the pool is in pages of 4 KiB, and reading from disk is slower"
        return Check(name, f"{slow}; `echo advise > {file}` (root; before the store starts) changes that")
    return Check(name, f"lent to the pool ({chosen})")


def check_sealing() -> Check:
    """Check that the kernel makes sealed shared memory, and that the seal holds."""
    try:
        with Region.create(4096) as region:
            os.ftruncate(region.fd, 0)
    except PermissionError:
        return Check("shared memory", "memfd, sealed")
    except KVKeepError as error:
        return Check("shared memory", "none", f"allow memfd_create (kernel or seccomp profile): {error}")
    return Check("shared memory", "memfd, but its seals do not hold", "use a Linux kernel of 5.14 or later")


def check_speed(clock: Callable[[], float]) -> Check:
    """Measure how fast 64 MiB are populated and then copied out; `clock` gives seconds."""
    name = f"memory speed ({size_text(_PROBE_NBYTES)})"
    out = np.ones(_PROBE_NBYTES, dtype=np.uint8)
    try:
        with Region.create(_PROBE_NBYTES) as region:
            began = clock()
            region.populate(0, region.nbytes)
            populated = clock()
            np.copyto(out, region.array)
            copied = clock()
    except ConfigError as error:
        return Check(name, "not enough memory", str(error))
    if out.any():
        return Check(name, "fresh shared memory is not zero", "do not use this kernel: it lends other programs' memory")
    return Check(name, f"populate {_rate(populated - began)}, copy {_rate(copied - populated)}")


def check_transfer(config: Config, file: Path | None, has_device: bool) -> list[Check]:
    """Say how a CUDA device copies: what is set, or what was measured by page size and direction; none, no row."""
    choice = kept_choice(file)
    if choice is None and not has_device:
        return []
    if config.transfer != "auto":
        found = f"{'the kernel' if config.transfer == 'kernel' else 'the copy engine'}, as set"
    elif choice is None:
        found = "not measured yet: an engine does it when it starts"
    else:
        stale = choice.programs != config.transfer_programs
        again = f"; measured again for transfer_programs = {config.transfer_programs} when an engine starts"
        found = "\n".join([f"{choice.device}, {choice.programs} programs{again if stale else ''}", *choice.lines])
    return [Check("GPU copies", found)]


def as_table(checks: list[Check]) -> Table:
    """Lay the checks out for people, one row each."""
    table = Table("check", "", "found", "cure")
    for check in checks:
        verdict = Text("problem", style="red") if check.cure else Text("ok", style="green")
        table.add_row(cell(check.name), verdict, cell(*check.found.splitlines()), cell(*check.cure.splitlines()))
    return table


def _rate(seconds: float) -> str:
    return f"{_PROBE_NBYTES / max(seconds, 1e-9) / 1e9:.1f} GB/s"
