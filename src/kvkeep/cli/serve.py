"""`kvkeep serve`: the shared store of a host; `kvkeep stats`: what it holds. Neither imports torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvkeep.config import parse_size
from kvkeep.errors import StoreGone
from kvkeep.wire.client import Joining
from kvkeep.wire.messages import VERSION, Hello, Stats
from kvkeep.wire.process import StoreOptions, join_shared, run

ANSWER_LIMIT_S = 5.0
Socket = Annotated[Path, typer.Option("--socket", help="The store's Unix socket; its folder must be 0700.")]


def serve(
    socket: Socket,
    pool_size: Annotated[str, typer.Option(help='Host memory for the pool, as "4 GiB".')] = "4 GiB",
    policy: Annotated[str, typer.Option(help="lru, lfu, fifo or mru")] = "lru",
    max_pinned_share: Annotated[float, typer.Option(min=0.01, max=1.0, help="What waiting requests may pin.")] = 0.5,
) -> None:
    """Runs a store that any number of engines share, until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="kvkeep store %(process)d %(levelname)s %(message)s")
    options = StoreOptions(parse_size(pool_size, "--pool-size"), policy, max_pinned_share)
    run(options, None, socket.absolute())


def stats(socket: Socket) -> None:
    """Shows what a shared store holds, and proves that its index adds up."""
    hello = Hello(VERSION, "kvkeep stats", bytes(16), "", 1, [])
    client = Joining(join_shared(str(socket), ANSWER_LIMIT_S), hello).wait(ANSWER_LIMIT_S)
    answer = client.wait(client.stats(check=True), ANSWER_LIMIT_S)
    client.close()
    if not isinstance(answer, Stats):
        raise StoreGone(f"the store at {socket} did not answer within {ANSWER_LIMIT_S:.0f} s")
    table = Table("figure", "value", title=f"store at {socket}")
    for name, value in answer.figures.items():
        text = f"{value / 2**20:,.1f} MiB" if name.endswith("_nbytes") else f"{value:,}"
        table.add_row(name.removesuffix("_nbytes").replace("_", " "), text)
    table.add_row("index adds up", answer.problem or "yes")
    Console().print(table)
    if answer.problem:
        raise typer.Exit(1)
