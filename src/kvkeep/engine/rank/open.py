"""Opens a rank's worker as the settings say.

Knows nothing about the engine's classes, plans or keys.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvkeep.config import Config
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.copies.open import open_copies
from kvkeep.engine.plan import RankInfo
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.trace import Trace
from kvkeep.transfer.device.choice import Wish, default_file
from kvkeep.transfer.transfer import Opened
from kvkeep.wire.pool_socket import PoolDoor

log = logging.getLogger("kvkeep")


def wish_of(config: Config) -> Wish:
    """How a device shall copy, by the settings, and the user's file where what it measures is kept."""
    return Wish(default_file(), config.transfer, config.transfer_programs)


def open_rank(rank: int, opened: Opened, door: PoolDoor, config: Config, alone: bool, whole: bool) -> Worker:
    """A rank's worker. `alone`: no other rank computes on this host; `whole`: a layer is computed in one piece."""
    log.info("kvkeep: copies: %s", opened.text)
    mode = config.transfer_mode if whole else "bulk"
    if mode != config.transfer_mode:
        log.info("kvkeep: transfer_mode %s: bulk, since layers are not computed whole", config.transfer_mode)
    trace = Trace(config.trace_path)
    copies = open_copies(opened, mode, alone, beside=True, trace=trace)
    early = isinstance(copies, CpuCopies) and copies.ahead and mode == "layerwise"
    return Worker(rank, copies, MappedPool(door, opened.pin_calls), trace, early=early)


def early_loads(config: Config, ranks: Sequence[RankInfo], beside_steps: bool) -> bool:
    """Whether steps may wait for chunks that a tier still reads; if that is set and cannot be, the log says why."""
    if not config.early_loads:
        return False
    why = config.early_refusal
    if not why and beside_steps:
        why = "this engine's loads are always beside its steps"
    if not why and (len(ranks) > 1 or not all(info.early for info in ranks)):
        why = "copies by layer need one rank, on a CPU, and a core that it leaves free"
    log.info("kvkeep: early_loads: %s", f"no, since {why}" if why else "yes")
    return not why
