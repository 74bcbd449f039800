"""`kvkeep serve` runs the shared store of a host; `kvkeep stats` shows what it holds. Neither imports torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvkeep.cli.ask import ask_stats
from kvkeep.cli.plain import cell
from kvkeep.config import STORE_SETTINGS, describe_settings
from kvkeep.core.identity import told_apart
from kvkeep.memory.limits import amount_text
from kvkeep.sources import load_config
from kvkeep.store.process import run, write_log
from kvkeep.telemetry import flat_name
from kvkeep.wire.messages import Known

MAX_SHOWN_CHARS = 256  # of a name
Socket = Annotated[Path, typer.Option("--socket", help="The store's Unix socket; its folder must be 0700.")]


def serve(
    socket: Socket,
    config: Annotated[Path | None, typer.Option(help="A TOML file; the options below are stronger.")] = None,
    **settings: str | None,
) -> None:
    """Runs a store that any number of engines share, until SIGTERM or Ctrl-C."""
    options: dict[str, object] = {name: text for name, text in settings.items() if text is not None}
    if config is not None:
        options["config_file"] = str(config)
    chosen = load_config(options, os.environ, command_line=True)
    write_log(chosen.log_level)
    run(chosen, None, socket.absolute())


def _with_settings(command: Callable[..., None]) -> inspect.Signature:
    """The command's signature with an option for each setting of a store in place of `**settings`."""
    right = describe_settings()
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=text)],
        )
        for name, text in right.items()
        if name in STORE_SETTINGS
    ]
    return inspect.Signature(parameters)


serve.__signature__ = _with_settings(serve)  # type: ignore[attr-defined]  # what typer makes the options of


def stats(socket: Socket) -> None:
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
