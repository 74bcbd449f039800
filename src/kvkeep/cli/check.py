"""`kvkeep check DIR` reads every record of a disk tier's directory, says what is wrong, and removes it if asked to.

Knows nothing about a running store beyond the lock on its directory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from kvkeep.cli.plain import cell
from kvkeep.cli.stats import show_namespaces
from kvkeep.core.units import NAMESPACE_NBYTES
from kvkeep.errors import TierUnavailable
from kvkeep.store.identities import FILE, load_identities
from kvkeep.store.namespaces import Named
from kvkeep.tiers.disk.boot import lock_directory
from kvkeep.tiers.disk.directio import Files, posix_files
from kvkeep.tiers.disk.scrub import Condition, Finding, known_epochs, record_paths, scrub
from kvkeep.wire.messages import Known

_SHOWN = 100  # lines of a report that a person reads


def check(
    directory: Annotated[str, typer.Argument(help="A directory of the disk tier.")],
    repair: Annotated[bool, typer.Option(help="Remove what is bad; no store may use the directory.")] = False,
) -> None:
    """Verify every record; exit status 1 if something is bad and still there, 2 for what is no directory of kvkeep."""
    check_directory(directory)
    files = posix_files()
    with open(lock_directory(files, directory), "rb") if repair else nullcontext():
        bad, counts, owners = examine(files, directory)
        left = [finding for finding in bad if not (repair and _remove(files, finding.path))]
    console = Console(soft_wrap=True, highlight=False)
    for finding in bad[:_SHOWN]:
        console.print(cell(f"{finding.condition.value}: {finding.path}: {finding.why}"))
    if len(bad) > _SHOWN:
        console.print(f"... and {len(bad) - _SHOWN} more")
    total = sum(counts.values())
    parts = [f"{counts[kind]} {kind.value}" for kind in Condition if counts[kind] or kind is Condition.GOOD]
    console.print(f"{total} records: {', '.join(parts)}" + (f"; {len(bad) - len(left)} removed" if repair else ""))
    names, problem = named(Path(directory))
    if problem:
        console.print(cell(problem))
    show_namespaces(by_namespace(names, owners), "records")
    if left:
        raise typer.Exit(1)


def examine(files: Files, directory: str) -> tuple[list[Finding], Counter[Condition], Counter[bytes]]:
    """The bad records, and how many records there are in each condition and namespace; shows a bar on a terminal."""
    try:
        records, epochs = record_paths(files, directory), known_epochs(files, directory)
    except OSError as error:
        raise TierUnavailable(f"{directory} cannot be read: {error}") from error
    console = Console(stderr=True)
    findings = track(
        scrub(files, records, epochs), "verifying", len(records), console=console, disable=not console.is_terminal
    )
    bad: list[Finding] = []
    counts: Counter[Condition] = Counter()
    for finding in findings:
        if finding is None:
            continue
        counts[finding.condition] += 1
        if finding.condition is not Condition.GOOD:
            bad.append(finding)
    return bad, counts, Counter(key[:NAMESPACE_NBYTES] for key, _ in records)


def check_directory(directory: str) -> None:
    """Raise TierUnavailable unless a disk tier has used this directory: a wrong path must not pass as a good one."""
    if not os.path.isdir(directory):
        raise TierUnavailable(f"{directory or '(an empty name)'} is no directory")
    there = [name for name in ("lock", "new", "epochs") if os.path.lexists(os.path.join(directory, name))]
    if "epochs" not in there and there != ["lock", "new"]:
        raise TierUnavailable(
            f"{directory} is no directory of kvkeep's disk tier: it has no `epochs`, no `lock` and no `new`. "
            "Name one that disk_path names"
        )


def named(directory: Path) -> tuple[dict[bytes, Named], str]:
    """The namespaces that have a name in this directory, and what is wrong with the file of the names ("": nothing)."""
    try:
        return load_identities(directory), ""
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{directory / FILE} cannot be used, so no namespace has a name here: {error}"


def by_namespace(names: Mapping[bytes, Named], owners: Counter[bytes]) -> list[Known]:
    """How many records each namespace has, the one named last at the end; empty if no namespace has a name."""
    if not names:
        return []
    known = [Known(key, *names[key], owners[key]) for key in names if owners[key]]
    return [*(Known(key, "not named", "", owners[key]) for key in owners if key not in names), *known]


def _remove(files: Files, path: str) -> bool:
    with suppress(OSError):
        files.names.unlink(path)
        return True
    return False
