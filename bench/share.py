"""Two engines over one pool against two with half of it each: `python bench/share.py --json bench/results/share.json`.

Requests of Mooncake's public traces go to two engines in turn (`turn`) or by conversation (`sticky`: the same first
blocks, the same engine). At the level of the store: real keys, index and leases, no bytes, no engine. The pool is a
share of the trace's working set, so that the figures hold for any size of chunk.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

from kvkeep.bench.rows import Case, Row, say, show, write
from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.registry import policy_by_name
from kvkeep.store.openings import Opening
from kvkeep.store.store import Store

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
CHUNK = 4096
ENGINES = 2
Trace = list[list[int]]


def read(path: Path, requests: int) -> Trace:
    with gzip.open(path, "rt") as lines:
        found = [json.loads(line)["hash_ids"] for line in lines]
    return found[:requests]


class Engines:
    """Two sessions: over one store of `chunks`, or over one each of half as many."""

    def __init__(self, chunks: int, shared: bool, policy: str) -> None:
        sizes = [chunks] if shared else [chunks // ENGINES] * ENGINES
        stores = [Store(Index(FreeList(n * CHUNK), policy_by_name(policy)), n * CHUNK, 1.0) for n in sizes]
        self.stores = [stores[n % len(stores)] for n in range(ENGINES)]
        self.sessions = [store.open(Opening("engine", b"n" * 16, "", CHUNK, holders=())) for store in self.stores]

    def request(self, engine: int, blocks: list[int]) -> int:
        """A prompt's lookup, then its missing chunks; how many chunks were hits."""
        store, session = self.stores[engine], self.sessions[engine]
        digests = [block.to_bytes(32, "big") for block in blocks]
        found = store.fetch(session, digests)
        store.release(session, found.lease)
        hits = len(found.offsets)
        granted = store.reserve(session, digests[hits:])
        places = [place for place, one in enumerate(granted.offsets) if isinstance(one, int)]
        store.commit(session, granted.lease, places, [b""] * len(places))
        store.release(session, granted.lease)
        return hits


def hit_rate(trace: Trace, engines: Engines, route: Callable[[int, list[int]], int]) -> float:
    """The share of all blocks that were hits."""
    hits = sum(engines.request(route(number, blocks), blocks) for number, blocks in enumerate(trace))
    return hits / sum(map(len, trace))


ROUTES: dict[str, Callable[[int, list[int]], int]] = {
    "turn": lambda number, _: number % ENGINES,
    "sticky": lambda _, blocks: hash(tuple(blocks[:2])) % ENGINES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[Row] = []
    for name in ("conversation", "synthetic"):
        trace = read(asked.traces / f"mooncake_{name}.jsonl.gz", asked.requests)
        working = len({block for blocks in trace for block in blocks})
        say(f"{name}: {len(trace)} requests, {sum(map(len, trace))} blocks, {working} of them different")
        for share in (0.02, 0.1, 0.3):
            for route, choose in ROUTES.items():
                both = [hit_rate(trace, Engines(int(share * working), one, "lru"), choose) for one in (True, False)]
                case = f"share-{name}-{share:g}-{route}"
                yardstick = "a half each"
                rows.append(Case(case, "hit rate", yardstick, better="higher").row(both[:1], both[1:]))
    show(rows, "Two engines: one pool together, against a half each")
    write(rows, asked.json)


if __name__ == "__main__":
    main()
