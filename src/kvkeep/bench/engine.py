"""Times `CacheEngine`, its verbs without any copying and its copies: `kvkeep bench engine`.

Each case has a private store process and one thread here. It takes wall time, since the verbs wait for the store. Knows
nothing about how rows are shown. `python -m kvkeep.bench.engine RUNS` prints the rows as JSON: a process of its own,
because the command line imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from kvkeep.bench.copies import BLOCK_TOKENS, CHUNK_TOKENS, LAYERS, Words, copy_rows, engine, fresh
from kvkeep.bench.rows import Case, Row, alternate, seconds
from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
from kvkeep.doors.library.cache_engine import CacheEngine
from kvkeep.testing.doubles.transfers import StillTransfer

CHUNKS = 512  # of a prompt of 131,072 tokens
TOKENS = CHUNKS * CHUNK_TOKENS


@dataclass
class VerbBench:
    """A prompt and what each verb costs with it: microseconds a chunk."""

    engine: CacheEngine
    tokens: Words
    table: npt.NDArray[np.intp]
    numbers: np.random.Generator

    def store(self) -> float:
        """New tokens, hashing included; as many chunks are evicted."""
        new = fresh(self.numbers, TOKENS)
        return _each(lambda: self.engine.store(new, [self.table]))

    def retrieve(self) -> float:
        """Tokens that have been hashed before."""
        return _each(lambda: int(self.engine.retrieve(self.tokens, [self.table]).sum()))

    def lookup(self) -> float:
        """Tokens that have been hashed before."""
        return _each(lambda: self.engine.lookup(self.tokens))

    def lookup_new(self) -> float:
        """Tokens that nobody has hashed: nothing is found."""
        new = fresh(self.numbers, TOKENS)
        return _each(lambda: self.engine.lookup(new) + TOKENS)

    def trip(self) -> float:
        """The yardstick: a question to the store that needs no work."""
        return seconds(self.engine.store_figures) / CHUNKS * 1e6


def verb_rows(runs: int) -> list[Row]:
    """The verbs over 512 chunks of 32 layers, beside a bare round trip."""
    layers = tuple(LayerLayout(f"layer {n}", (64,)) for n in range(LAYERS))
    shard = ShardLayout(CHUNK_TOKENS, (GroupLayout(BLOCK_TOKENS, 0, layers),))
    numbers = np.random.default_rng(1)
    table = np.arange(1, TOKENS // BLOCK_TOKENS + 1)
    with engine(StillTransfer(shard), 3 * CHUNKS, []) as library:
        verbs = VerbBench(library, fresh(numbers, TOKENS), table, numbers)
        cases: list[tuple[str, Callable[[], float], str]] = [
            ("store-chunk", verbs.store, "<= 15 us"),
            ("retrieve-chunk", verbs.retrieve, "<= 15 us"),
            ("engine-lookup-chunk", verbs.lookup, "<= 3 us"),
            ("engine-lookup-new-tokens", verbs.lookup_new, ""),
        ]
        made = []
        for name, measure, goal in cases:
            library.store(verbs.tokens, [table])  # the stores before may have displaced them
            case = Case(name, "us", "a bare round trip, by as many chunks", goal=goal)
            made.append(case.row(*alternate(runs, measure, verbs.trip)))
        return made


def _each(action: Callable[[], int]) -> float:
    def checked() -> None:
        done = action()
        assert done == TOKENS, f"{done} tokens"

    return seconds(checked) / CHUNKS * 1e6


def engine_rows(runs: int) -> list[Row]:
    """All cases."""
    return [*verb_rows(runs), *copy_rows(runs, layerwise=False), *copy_rows(runs, layerwise=True)]


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in engine_rows(int(sys.argv[1]))]))
