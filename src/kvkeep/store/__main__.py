"""The store process's command line: `python -m kvkeep.store`, with `--fd N` (private) or `--socket PATH` (shared)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec

from kvkeep.config import Config
from kvkeep.errors import KVKeepError
from kvkeep.store.process import run, write_log


def main(arguments: list[str]) -> int:
    """Runs a store; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="kvkeep.store", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="the inherited socket of a private store")
    where.add_argument("--socket", type=Path, help="where a shared store listens")
    parser.add_argument("--options", type=_options, required=True, help="a kvkeep.config.Config as JSON")
    asked = parser.parse_args(arguments)
    write_log(asked.options.log_level)
    try:
        run(asked.options, asked.fd, asked.socket)
    except KVKeepError as error:
        logging.getLogger("kvkeep.store").error("%s", error)
        return 2
    return 0


def _options(text: str) -> Config:
    try:
        return msgspec.json.decode(text, type=Config)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
