"""Times a client of a store process that stores and retrieves 256 MiB, block by block: `kvkeep bench daemon`.

Each copy is one layer of one block, as between a cache with layers first and a chunk. Both sides of the comparison loop
in Python. Knows nothing about engines.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvkeep.bench.daemon import LIMIT_S, client, serving
from kvkeep.bench.rows import Case, Row, alternate, expect, seconds
from kvkeep.memory.region import Region
from kvkeep.wire.client import Client
from kvkeep.wire.messages import Granted, Matched

TOKEN_NBYTES = 128 << 10
CHUNK_NBYTES = 256 * TOKEN_NBYTES
MOVED_NBYTES = 256 << 20
MOVED_CHUNKS = MOVED_NBYTES // CHUNK_NBYTES
BLOCK_NBYTES = 16 * TOKEN_NBYTES  # what one block of 16 tokens has of all layers
LAYERS = 32
LINE_NBYTES = 64

Octets = npt.NDArray[np.uint8]


class PieceBench:
    """One client over an engine's cache of blocks, layer by layer, and bare memory to compare with."""

    def __init__(self, joined: Client, pool: Octets, bare: Octets) -> None:
        self.joined, self.pool, self.bare = joined, pool, bare
        self.blocks = aligned(MOVED_NBYTES).reshape(LAYERS, MOVED_NBYTES // BLOCK_NBYTES, BLOCK_NBYTES // LAYERS)
        self.digests: list[bytes] = []

    def memmove(self, out: bool) -> float:
        """The copies alone, to or from bare memory (GB/s)."""
        return _speed(lambda: self._copied(np.split(self.bare, MOVED_CHUNKS), out))

    def store(self) -> float:
        """Reserves, copies, commits (GB/s)."""
        return _speed(self._store)

    def retrieve(self) -> float:
        """Fetches, copies, releases (GB/s)."""
        return _speed(self._retrieve)

    def _store(self) -> None:
        self.digests = [secrets.token_bytes(32) for _ in range(MOVED_CHUNKS)]
        granted = self.joined.wait(self.joined.reserve(self.digests), LIMIT_S)
        assert isinstance(granted, Granted)
        self._copied(self._chunks(granted.offsets), out=True)
        self.joined.wait(self.joined.commit(granted.lease, range(MOVED_CHUNKS), [bytes(1024)] * MOVED_CHUNKS), LIMIT_S)
        self.joined.release(granted.lease)

    def _retrieve(self) -> None:
        found = self.joined.wait(self.joined.fetch(self.digests), LIMIT_S)
        assert isinstance(found, Matched)
        self._copied(self._chunks(found.offsets), out=False)
        self.joined.release(found.lease)

    def _copied(self, chunks: list[Octets], out: bool) -> None:
        number = 0
        for chunk in chunks:
            for piece in chunk.reshape(-1, LAYERS, BLOCK_NBYTES // LAYERS):
                for layer in range(LAYERS):
                    if out:
                        piece[layer] = self.blocks[layer, number]
                    else:
                        self.blocks[layer, number] = piece[layer]
                number += 1

    def _chunks(self, offsets: Sequence[int]) -> list[Octets]:
        expect(len(offsets) == MOVED_CHUNKS and min(offsets) >= 0, "every chunk has a place")
        return [self.pool[offset : offset + CHUNK_NBYTES] for offset in offsets]


def piece_rows(runs: int) -> list[Row]:
    """Stores and retrieves by one client, beside the same copies to private and to shared memory."""
    rows = []
    with serving(2 * MOVED_NBYTES + CHUNK_NBYTES) as (path, _):
        joined = client(path, CHUNK_NBYTES)
        with Region.attach(os.dup(joined.pool_fd)) as region, Region.create(MOVED_NBYTES) as shared:
            region.populate(0, region.nbytes)
            shared.array[:] = 1
            for name, bare in (("private", aligned(MOVED_NBYTES)), ("shared", shared.array)):
                rows += _beside(PieceBench(joined, region.array, bare), name, runs)
            del bare
        joined.close()
    return rows


def _beside(pieces: PieceBench, name: str, runs: int) -> list[Row]:
    measures = (lambda: pieces.memmove(True), pieces.store, lambda: pieces.memmove(False), pieces.retrieve)
    bare_out, stored, bare_in, retrieved = alternate(runs, *measures)
    end, yardstick = "" if name == "private" else f"-{name}", f"memmove, {name} memory (GB/s)"
    return [
        Case(f"daemon-{case}{end}", "GB/s", yardstick, better="higher", goal=">= 0.9").row(ours, theirs)
        for case, ours, theirs in (("store", stored, bare_out), ("retrieve", retrieved, bare_in))
    ]


def aligned(nbytes: int) -> Octets:
    """Written memory that begins at a cache line, as an engine's tensors do; NumPy's own begins 16 bytes after one.

    A copy to there takes twice as long where the source is a page, as in the pool.
    """
    raw = np.ones(nbytes + LINE_NBYTES, np.uint8)
    start = -raw.ctypes.data % LINE_NBYTES
    return raw[start : start + nbytes]


def _speed(action: Callable[[], object]) -> float:
    return MOVED_NBYTES / seconds(action) / 1e9
