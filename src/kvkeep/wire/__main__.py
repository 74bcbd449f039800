"""The store process's command line: `python -m kvkeep.wire --fd N ...` (private) or `--socket PATH ...` (shared)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from kvkeep.errors import KVKeepError
from kvkeep.wire.process import StoreOptions, run


def main(arguments: list[str]) -> int:
    """Runs a store; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="kvkeep.wire", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="the inherited socket of a private store")
    where.add_argument("--socket", type=Path, help="where a shared store listens")
    parser.add_argument("--pool-nbytes", type=int, required=True)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--max-pinned-share", type=float, default=0.5)
    parser.add_argument("--log-level", default="info")
    asked = parser.parse_args(arguments)
    logging.basicConfig(
        level=asked.log_level.upper(),
        format="kvkeep store %(process)d %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    options = StoreOptions(asked.pool_nbytes, asked.policy, asked.max_pinned_share, asked.log_level)
    try:
        run(options, asked.fd, asked.socket)
    except KVKeepError as error:
        logging.getLogger("kvkeep.store").error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
