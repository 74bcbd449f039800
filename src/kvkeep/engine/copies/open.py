"""The copies that suit what an engine's cache lies on: by the CPU, or by a device of its own accord.

Knows nothing about plans, keys or who asks for copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.engine.copies.cpu import CpuCopies, Timing
from kvkeep.engine.copies.device import DeviceCopies, Settlers
from kvkeep.engine.copies.mode import CopyMode, Mode, SizeMode
from kvkeep.engine.copies.thread import ThreadCopier, spare_cores
from kvkeep.trace import Trace
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.device import DeviceTransfer
from kvkeep.transfer.transfer import Opened


def open_copies(
    opened: Opened, mode: Mode, alone: bool, beside: bool, layers: Sequence[str] = (), trace: Trace | None = None
) -> CpuCopies | DeviceCopies:
    """Copies by `opened`. `alone`: no other rank computes on this host.

    `beside`: copies are also made beside the caller's steps, and it may not wait for layers; else it waits for all of
    them, and for the copies' end. `layers` are the layers' names in the order in which they are computed (none: as they
    are arranged); ValueError unless each is named once. Copies on a thread need memory that the CPU reaches, and a core
    that no other rank computes on.
    """
    transfer = opened.transfer
    order = transfer.shard.in_order(layers)
    if isinstance(transfer, DeviceTransfer):
        settlers = Settlers(ThreadCopier(), ThreadCopier()) if beside else None
        return DeviceCopies(transfer, SizeMode(mode, waits=not beside), settlers, order)
    by_cpu = isinstance(transfer, ReferenceTransfer)
    wanted = by_cpu and alone and (beside or mode != "bulk")
    cores = spare_cores() if wanted else frozenset()
    choice = CopyMode(mode if by_cpu or not beside else "bulk", bool(cores))
    copier = ThreadCopier(cores) if cores else None
    return CpuCopies(transfer, copier, choice, opened.states, order=order, timing=Timing(trace=trace or Trace()))
