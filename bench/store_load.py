"""A client that keeps a store busy: `python bench/store_load.py SOCKET` looks up, reserves, commits until it is ended.

Moves no bytes: what the store does is all there is. Runs off core 0, where the engine's step is measured.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from kvkeep.bench.daemon import CHUNKS, LIMIT_S, client
from kvkeep.wire.client import Client
from kvkeep.wire.messages import Granted, Matched

CHUNK_NBYTES = 1 << 20


def one_request(one: Client) -> None:
    """What a request of 8,192 tokens costs a store: a miss, its 32 chunks stored, then a hit."""
    digests = [secrets.token_bytes(32) for _ in range(CHUNKS)]
    one.wait(one.fetch(digests), LIMIT_S)
    granted = one.wait(one.reserve(digests), LIMIT_S)
    assert isinstance(granted, Granted)
    places = [place for place, offset in enumerate(granted.offsets) if offset >= 0]
    one.wait(one.commit(granted.lease, places, [bytes(256)] * len(places)), LIMIT_S)
    one.release(granted.lease)
    matched = one.wait(one.fetch(digests), LIMIT_S)
    assert isinstance(matched, Matched)
    one.release(matched.lease)


def main() -> None:
    cores = os.sched_getaffinity(0) - {0}
    if cores:
        os.sched_setaffinity(0, cores)
    one = client(Path(sys.argv[1]), CHUNK_NBYTES)
    print("at work", flush=True)
    while one.alive:
        one_request(one)


if __name__ == "__main__":
    main()
