"""Whether copies go in bulk or layer by layer: as it is set, or as it has cost less, or by their size.

Knows nothing about copies. Seconds and bytes go in.
"""

from __future__ import annotations

import logging
from statistics import median
from typing import Literal

log = logging.getLogger("kvkeep")

TRIALS = 4
LEAST_NBYTES = 1 << 20  # copies of less are not counted
BY_LAYER_NBYTES = 64 << 20  # more than a millisecond: worth a launch a layer
NO_WAIT = "kvkeep: transfer_mode: bulk from now on, since this engine does not wait for layers"

Mode = Literal["bulk", "layerwise", "auto"]


class CopyMode:
    """For a CPU. `mode` "auto" takes what has cost the caller less; `possible`: a copy can run beside the caller."""

    def __init__(self, mode: Mode, possible: bool) -> None:
        self._trials: dict[bool, list[float]] = {False: [], True: []}
        self._fixed: bool | None = mode == "layerwise" if mode != "auto" else None if possible else False
        if mode == "auto" and not possible:
            log.info("kvkeep: transfer_mode auto: bulk, since no core is free for copies beside the engine")

    def layerwise(self) -> bool:
        """How the next copies are made."""
        if self._fixed is not None:
            return self._fixed
        return len(self._trials[True]) < len(self._trials[False])

    def took(self, layerwise: bool, seconds: float, nbytes: int) -> None:
        """The caller's thread spent this long on copies."""
        if self._fixed is not None or nbytes < LEAST_NBYTES:
            return
        self._trials[layerwise].append(seconds / nbytes)
        if min(map(len, self._trials.values())) < TRIALS:
            return
        bulk, layers = (median(self._trials[way]) * 2**30 for way in (False, True))
        self._fixed = layers < bulk
        name = "layerwise" if self._fixed else "bulk"
        log.info("kvkeep: transfer_mode auto: %s (bulk %.3f s a GiB, layerwise %.3f)", name, bulk, layers)

    def never_layerwise(self) -> None:
        """The engine does not wait for layers: says so once, and stays with bulk."""
        log.error(NO_WAIT)
        self._fixed = False


class SizeMode:
    """For a device. In "auto" stores go by layer if they are large, and loads too if the engine `waits` for layers."""

    def __init__(self, mode: Mode, waits: bool = False) -> None:
        self._mode = mode
        self._waits = waits

    def loads_layerwise(self, nbytes: int) -> bool:
        """How loads of so many bytes are made."""
        return self._mode == "layerwise" or (self._waits and self.stores_layerwise(nbytes))

    def stores_layerwise(self, nbytes: int) -> bool:
        """How stores of so many bytes are made."""
        return self._mode == "layerwise" or (self._mode == "auto" and nbytes >= BY_LAYER_NBYTES)

    def never_layerwise(self) -> None:
        """The engine does not wait for layers: says so once, and stays with bulk."""
        log.error(NO_WAIT)
        self._mode = "bulk"
