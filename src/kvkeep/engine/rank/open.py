"""A rank's half that suits what its cache is kept on: copies by the CPU, or by a device of its own accord.

Knows nothing about the engine's classes, plans or keys.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvkeep.config import Config
from kvkeep.engine.copies.device import Rank
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.copies.thread import InlineCopier, ThreadCopier, spare_cores
from kvkeep.engine.plan import RankInfo
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.device_worker import DeviceWorker
from kvkeep.engine.rank.worker import Worker
from kvkeep.trace import Trace
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.choice import Wish, default_file
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.transfer import Opened
from kvkeep.wire.pool_socket import PoolDoor

log = logging.getLogger("kvkeep")


def wish_of(config: Config) -> Wish:
    """How a device shall copy, as it is set; what is measured is kept for this user."""
    return Wish(default_file(), config.transfer, config.transfer_programs)


def open_rank(
    rank: int, opened: Opened, door: PoolDoor, config: Config, alone: bool, whole: bool
) -> Worker | DeviceWorker:
    """A rank's half. `alone`: no other rank computes on this host; `whole`: layers are computed one by one, whole.

    Copies on a thread need memory that the CPU reaches, and a core that no other rank computes on.
    """
    log.info("kvkeep: copies: %s", opened.text)
    mode = config.transfer_mode if whole else "bulk"
    if mode != config.transfer_mode:
        log.info("kvkeep: transfer_mode %s: bulk, since layers are not computed whole", config.transfer_mode)
    transfer = opened.transfer
    if isinstance(transfer, DeviceTransfer):
        return DeviceWorker(Rank(rank, transfer, MappedPool(door, opened.pin_calls)), ThreadCopier, mode)
    by_cpu = isinstance(transfer, ReferenceTransfer)
    cores = spare_cores() if by_cpu and alone else frozenset()
    copier = ThreadCopier(cores) if cores else InlineCopier()
    choice = CopyMode(mode if by_cpu else "bulk", bool(cores))
    worker = Worker(rank, transfer, door, copier, choice, Trace(config.trace_path))
    worker.states = opened.states
    worker.early = by_cpu and bool(cores) and mode == "layerwise"
    return worker


def early_loads(config: Config, ranks: Sequence[RankInfo], beside_steps: bool) -> bool:
    """Whether steps may wait for what a tier still reads; the log says why not where that was asked for."""
    if not config.early_loads:
        return False
    why = config.early_refusal
    if not why and beside_steps:
        why = "this engine's loads are always beside its steps"
    if not why and (len(ranks) > 1 or not all(info.early for info in ranks)):
        why = "copies by layer need one rank, on a CPU, and a core that it leaves free"
    log.info("kvkeep: early_loads: %s", f"no, since {why}" if why else "yes")
    return not why
