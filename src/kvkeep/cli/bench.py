"""`kvkeep bench` measures how fast the parts are on this machine, each beside a yardstick of the same run.

Imports no torch. Knows the groups of cases and how to show them; the modules of `kvkeep.bench` know what a case does.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvkeep.bench.core import alloc_rows, key_rows, policy_rows
from kvkeep.bench.daemon import idle_rows, lookup_rows
from kvkeep.bench.disk import disk_rows
from kvkeep.bench.engine_child import WITHOUT_TORCH, engine_rows, has_torch
from kvkeep.bench.index import index_rows
from kvkeep.bench.pieces import piece_rows
from kvkeep.bench.rows import Row, check_target, say, show, write


class Group(StrEnum):
    """What can be asked for."""

    KEYS = "keys"
    ALLOC = "alloc"
    POLICY = "policy"
    INDEX = "index"
    ENGINE = "engine"
    DAEMON = "daemon"
    DISK = "disk"


ROWS: dict[Group, Callable[[int], list[Row]]] = {
    Group.KEYS: key_rows,
    Group.ALLOC: alloc_rows,
    Group.POLICY: policy_rows,
    Group.INDEX: index_rows,
    Group.ENGINE: engine_rows,
    Group.DAEMON: lambda runs: [*lookup_rows(runs), *piece_rows(runs), *idle_rows(runs)],
    Group.DISK: disk_rows,
}
CORE = (Group.KEYS, Group.ALLOC, Group.POLICY, Group.INDEX)


def bench(
    groups: Annotated[
        list[Group] | None, typer.Argument(help="Which parts; those of the core if none is named.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="How often each case and its yardstick run, in turn.")] = 15,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file too; it keeps those of groups not named.")
    ] = None,
) -> None:
    """Measures keys, allocators, policies and the index: one thread each, in CPU time, about a minute; others by name.

    engine: `CacheEngine`, about a minute. daemon: four client processes over one store process, about two. disk: the
    disk tier in a folder of $TMPDIR (1 GiB), about two.
    """
    chosen = groups or CORE
    if Group.ENGINE in chosen and not has_torch():
        say(WITHOUT_TORCH)
        raise typer.Exit(2)
    if json is not None:
        check_target(json)
    made: list[Row] = []
    for group in chosen:
        say(f"{group.value} ...")
        made += ROWS[group](runs)
    show(made, "kvkeep bench")
    write(made, json, keeps=bool(groups))
