"""Gathers and scatters with the device's copy engines: an asynchronous copy for each run of neighbouring blocks.

It takes no multiprocessor from the model, and suits large pages: each copy costs the driver about a microsecond, or
less where the driver takes a batch in one call (CUDA 12.8). Knows nothing about streams' order or leases' owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kvkeep.transfer.device.tables import CopyJob, Int64Array, Part, copies, cut, edges_of, merged


class Driver(Protocol):
    """What starts copies on a stream."""

    def copy(self, targets: Int64Array, sources: Int64Array, sizes: Int64Array, stream: int) -> None:
        """Starts copies between addresses, sizes in bytes (contiguous int64 arrays); none depends on another."""


class MemcpyCopier:
    """A `PageCopier` by copy engine; `stream` gives the handle of the current stream."""

    def __init__(self, parts: Sequence[Part], driver: Driver, stream: Callable[[], int]) -> None:
        self._parts = tuple(parts)
        self._driver = driver
        self._stream = stream

    def start(self, jobs: Sequence[CopyJob], to_pool: bool, only: int | None) -> None:
        """As `PageCopier.start`."""
        parts = [part for part in self._parts if only is None or part.range_ == only]
        rows = cut(merged(copies(parts, jobs)), edges_of(jobs))
        if not len(rows):
            return
        pages, pool, sizes = (np.ascontiguousarray(column) for column in rows.T)
        targets, sources = (pool, pages) if to_pool else (pages, pool)
        self._driver.copy(targets, sources, sizes, self._stream())
