"""A client that keeps a store busy: `python bench/store_load.py SOCKET` looks up, reserves, commits until it is ended.

Moves no bytes: what the store does is all there is. Runs off core 0, where the engine's step is measured.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from pathlib import Path

from kvkeep.errors import StoreGone
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.messages import VERSION, Granted, Hello, Matched
from kvkeep.wire.process import join_shared

CHUNK_NBYTES = 1 << 20
CHUNKS = 32
LIMIT_S = 30.0


def hello(chunk_nbytes: int) -> Hello:
    """The first message of a benchmark's session."""
    return Hello(VERSION, "bench", bytes(16), "bench", chunk_nbytes, [os.getpid()], verify_every=64)


def join(path: Path, limit_s: float) -> socket.socket:
    """A connection to a store that may still be starting."""
    until = time.monotonic() + limit_s
    while True:
        try:
            return join_shared(str(path), limit_s)
        except StoreGone:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def one_request(client: Client) -> None:
    """What a request of 8,192 tokens costs a store: a miss, its 32 chunks stored, then a hit."""
    digests = [secrets.token_bytes(32) for _ in range(CHUNKS)]
    client.wait(client.fetch(digests), LIMIT_S)
    granted = client.wait(client.reserve(digests), LIMIT_S)
    assert isinstance(granted, Granted)
    places = [place for place, offset in enumerate(granted.offsets) if offset >= 0]
    client.wait(client.commit(granted.lease, places, [bytes(256)] * len(places)), LIMIT_S)
    client.release(granted.lease)
    matched = client.wait(client.fetch(digests), LIMIT_S)
    assert isinstance(matched, Matched)
    client.release(matched.lease)


def main() -> None:
    cores = os.sched_getaffinity(0) - {0}
    if cores:
        os.sched_setaffinity(0, cores)
    client = Joining(join(Path(sys.argv[1]), LIMIT_S), hello(CHUNK_NBYTES)).wait(LIMIT_S)
    print("at work", flush=True)
    while client.alive:
        one_request(client)


if __name__ == "__main__":
    main()
