"""Times the index with a request's chunks in one call, and weighs a million chunks: `kvkeep bench index`.

Knows nothing about how rows are shown. `python -m kvkeep.bench.index WHAT COUNT` prints the bytes a chunk of an
index, or of a dict of the same keys, with COUNT chunks; only a process of its own can tell.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvkeep.bench.core import ENTRIES, each, filled, keys, store
from kvkeep.bench.rows import Case, Row, alternate, cpu_seconds, expect
from kvkeep.core.index import Index
from kvkeep.core.key import key_of

LOOKUP_CHUNKS = 512
MILLION = 1_000_000
LIMIT_S = 120.0


def index_rows(runs: int) -> list[Row]:
    """A request of 512 chunks: looked up, stored and evicting as many; then the memory of a million."""
    index = filled(ENTRIES)
    wanted = keys(ENTRIES // 2, ENTRIES // 2 + LOOKUP_CHUNKS)
    digests = [key[16:] for key in wanted]
    plain = dict.fromkeys(wanted, 0)
    rows = [
        Case(name, "us", "a dict's get", goal=goal).row(
            *alternate(runs, ours, each(lambda: [plain.get(key) for key in wanted], LOOKUP_CHUNKS))
        )
        for name, goal, ours in (
            ("lookup-chunk", "<= 3 us", each(lambda: looked_up(index, digests), LOOKUP_CHUNKS)),
            ("reserve-commit-chunk", "", storing(index)),
        )
    ]
    memory = Case("index-bytes-per-chunk", "bytes", "a dict of the keys", goal="<= 400 bytes")
    few = max(1, min(runs, 2))
    return [*rows, memory.row(*alternate(few, lambda: process_nbytes("index"), lambda: process_nbytes("dict")))]


def looked_up(index: Index, digests: list[bytes]) -> None:
    """What a fetch and its release do: keys, pins, unpins."""
    run = index.pin_prefix([key_of(bytes(16), digest) for digest in digests])
    expect(len(run) == len(digests), "every chunk is found")
    index.unpin(run)


def storing(index: Index) -> Callable[[], float]:
    """Reserve 512 chunks in one call and commit them in another; as many are evicted. Microseconds a chunk."""
    number = 2 * ENTRIES

    def measure() -> float:
        nonlocal number
        number += LOOKUP_CHUNKS
        wanted = keys(number, number + LOOKUP_CHUNKS)
        return 1e6 * cpu_seconds(lambda: store(index, wanted)) / LOOKUP_CHUNKS

    return measure


def process_nbytes(what: str) -> float:
    """Bytes a chunk of a million, by a process of its own."""
    command = [sys.executable, "-m", "kvkeep.bench.index", what, str(MILLION)]
    return float(subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S).stdout)  # noqa: S603


def resident_nbytes() -> int:
    """Memory of this process that is not shared."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def bytes_per_chunk(what: str, count: int) -> float:
    """How much memory `count` chunks take in all structures, their keys included and their sums not."""
    gc.disable()
    before = resident_nbytes()
    kept: Index | dict[bytes, int]
    if what == "index":
        kept = filled(count)
        expect(kept.stats().committed_entries == count, "every chunk is kept")
    else:
        kept = dict.fromkeys(keys(0, count), 0)
    return (resident_nbytes() - before) / count


if __name__ == "__main__":
    print(bytes_per_chunk(sys.argv[1], int(sys.argv[2])))
