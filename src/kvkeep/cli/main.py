"""The `kvkeep` command: its commands, and the one place where a failure becomes a line of text.

Imports the module of a command when that command runs, so that `kvkeep --help` answers at once. Knows nothing about
what the commands do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import kvkeep
from kvkeep.errors import KVKeepError

# a command, its module, in which a function has its name, and what the list of commands says of it
COMMANDS = {
    "bench": ("kvkeep.cli.bench", "Measure how fast the parts of kvkeep are on this machine."),
    "check": ("kvkeep.cli.check", "Verify every record in a directory of the disk tier."),
    "doctor": ("kvkeep.cli.doctor", "Check this machine and the configuration."),
    "serve": ("kvkeep.cli.serve", "Run a store that all engines of this host share."),
    "stats": ("kvkeep.cli.stats", "Show what a shared store holds."),
}


class CommandGroup(TyperGroup):
    """All commands; a KVKeepError, or what the system refuses, is one line on stderr and exit status 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands; `ctx` is click's context."""
        return sorted([*super().list_commands(ctx), *COMMANDS])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return the command of this name; None if there is none."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _ = COMMANDS[cmd_name]
        made = typer.Typer(add_completion=False, rich_markup_mode=None)
        made.command(cmd_name)(getattr(import_module(module), cmd_name))
        return get_command(made)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands without importing one."""
        rows = {name: command.get_short_help_str() for name, command in self.commands.items()}
        rows |= {name: summary for name, (_, summary) in COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names and return what it returns."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has gone: click ends without a word
        except (KVKeepError, OSError) as error:
            fail(error)
            raise typer.Exit(2) from error


def fail(error: Exception) -> None:
    """Write a failure as one red line on stderr; brackets in it are no markup."""
    from rich.console import Console  # noqa: PLC0415 - 30 ms that only a failure needs

    from kvkeep.store.namespaces import plain  # noqa: PLC0415

    text = plain(f"kvkeep: {error}")
    Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def version() -> None:
    """Say which kvkeep this is."""
    typer.echo(f"kvkeep {kvkeep.__version__}")


@app.callback()
def kvkeep_command() -> None:
    """Keeps the KV cache of prompts and gives it back instead of computing it again."""


if __name__ == "__main__":
    app()
