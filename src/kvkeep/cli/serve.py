"""`kvkeep serve` runs the shared store of a host. Imports no torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvkeep.config import STORE_SETTINGS, describe_settings
from kvkeep.sources import load_config
from kvkeep.store.process import run, write_log

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
