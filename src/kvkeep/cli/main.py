"""The `kvkeep` command: its commands, and the one place where a failure becomes a line of text.

Knows nothing about what the commands do.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import kvkeep
from kvkeep.cli.bench import bench
from kvkeep.cli.check import check
from kvkeep.cli.doctor import doctor
from kvkeep.cli.serve import serve, stats
from kvkeep.errors import KVKeepError
from kvkeep.store.namespaces import plain


class CommandGroup(TyperGroup):
    """All commands; a KVKeepError, or what the system refuses, is one line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the click context `ctx` names and give back what it returns."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has gone: click ends without a word
        except (KVKeepError, OSError) as error:
            text = plain(f"kvkeep: {error}")
            Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=CommandGroup,
    help="Keeps the KV cache of prompts and gives it back instead of computing it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(check)
app.command()(doctor)
app.command()(serve)
app.command()(stats)


@app.command()
def version() -> None:
    """Say which kvkeep this is."""
    typer.echo(f"kvkeep {kvkeep.__version__}")


if __name__ == "__main__":
    app()
