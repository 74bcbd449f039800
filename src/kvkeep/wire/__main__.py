"""The store process's command line: `python -m kvkeep.wire --fd N ...` (private) or `--socket PATH ...` (shared)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec

from kvkeep.errors import KVKeepError
from kvkeep.tiers.holding import DiskOptions
from kvkeep.wire.process import StoreOptions, run, write_log


def main(arguments: list[str]) -> int:
    """Runs a store; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="kvkeep.wire", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="the inherited socket of a private store")
    where.add_argument("--socket", type=Path, help="where a shared store listens")
    parser.add_argument("--pool-nbytes", type=int, required=True)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--max-pinned-share", type=float, default=0.5)
    parser.add_argument("--lease-time-s", type=float, default=60.0)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--disk", type=_disk, help="the disk tier's options as JSON")
    asked = parser.parse_args(arguments)
    write_log(asked.log_level)
    options = StoreOptions(
        pool_nbytes=asked.pool_nbytes,
        policy=asked.policy,
        max_pinned_share=asked.max_pinned_share,
        lease_time_s=asked.lease_time_s,
        log_level=asked.log_level,
        disk=asked.disk,
    )
    try:
        run(options, asked.fd, asked.socket)
    except KVKeepError as error:
        logging.getLogger("kvkeep.store").error("%s", error)
        return 2
    return 0


def _disk(text: str) -> DiskOptions:
    try:
        return msgspec.json.decode(text, type=DiskOptions)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
