"""`kvkeep stats` shows what a shared store holds, and which namespaces are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvkeep.cli.ask import ask_stats
from kvkeep.cli.plain import cell
from kvkeep.core.identity import told_apart
from kvkeep.memory.limits import amount_text
from kvkeep.telemetry import flat_name
from kvkeep.wire.messages import Known

MAX_SHOWN_CHARS = 256  # of a name


def stats(socket: Annotated[Path, typer.Option("--socket", help="The store's Unix socket.")]) -> None:
    """Shows what a shared store holds, and proves that its index adds up."""
    answer = ask_stats(str(socket), check=True)
    table = Table("figure", "value", title=cell(f"store at {socket}"))
    for name, tier, value in answer.rows:
        text = amount_text(value) if name.endswith("_nbytes") else f"{value:,}"
        table.add_row(cell(flat_name(name, tier).removesuffix("_nbytes").replace("_", " ")), text)
    for name, why in answer.out.items():
        table.add_row(cell(name), cell(f"none: {why}"))
    table.add_row("index adds up", cell(answer.problem or "yes"))
    Console().print(table)
    show_namespaces(answer.known, "chunks in the pool")
    if answer.problem:
        raise typer.Exit(1)


def show_namespaces(known: Sequence[Known], what: str) -> None:
    """Shows who shares with whom: a row a namespace, with how many `what` it has, and how it differs from the last."""
    if not known:
        return
    table = Table("namespace", "named last by", what, "differs from the row above", title="namespaces")
    above = ""
    for row in known:
        apart = told_apart(row.identity, above) if above else []
        table.add_row(row.namespace.hex()[:8], cell(row.name[:MAX_SHOWN_CHARS]), f"{row.chunks:,}", cell(*apart))
        above = row.identity
    Console().print(table)
