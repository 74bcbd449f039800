"""Bulk or layerwise: as it is set, or what has cost the engine's thread less so far.

Knows nothing about copies. Seconds and bytes go in.
"""

from __future__ import annotations

import logging
from statistics import median

log = logging.getLogger("kvkeep")

TRIALS = 4
LEAST_NBYTES = 1 << 20  # steps that move less say nothing


class CopyMode:
    """`mode` is "bulk", "layerwise" or "auto"; `possible`: a copy can run beside the engine's thread at all."""

    def __init__(self, mode: str, possible: bool) -> None:
        self._trials: dict[bool, list[float]] = {False: [], True: []}
        self._fixed: bool | None = mode == "layerwise" if mode != "auto" else None if possible else False
        if mode == "auto" and not possible:
            log.info("kvkeep: transfer_mode auto: bulk, since no core is free for copies beside the engine")

    def layerwise(self) -> bool:
        """How the next step's copies are made."""
        if self._fixed is not None:
            return self._fixed
        return len(self._trials[True]) < len(self._trials[False])

    def took(self, layerwise: bool, seconds: float, nbytes: int) -> None:
        """The engine's thread spent this long on a step's copies."""
        if self._fixed is not None or nbytes < LEAST_NBYTES:
            return
        self._trials[layerwise].append(seconds / nbytes)
        if min(map(len, self._trials.values())) < TRIALS:
            return
        bulk, layers = (median(self._trials[one]) * 2**30 for one in (False, True))
        self._fixed = layers < bulk
        name = "layerwise" if self._fixed else "bulk"
        log.info("kvkeep: transfer_mode auto: %s (bulk %.3f s a GiB, layerwise %.3f)", name, bulk, layers)
