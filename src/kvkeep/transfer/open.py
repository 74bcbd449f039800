"""Which transfer suits a cache's device, and what page-locks the pool for it: the one place that asks what is there.

NumPy on a CPU; kernel and copy engine on a CUDA device with Triton; staging copies anywhere else. Knows nothing about
plans, pools or the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as File
from typing import NamedTuple

import torch

from kvkeep.memory.pin import PinCalls
from kvkeep.transfer.choice import Choice, decide, read_choice, write_choice
from kvkeep.transfer.cuda import CudaDriver, CudaMemory, load_driver
from kvkeep.transfer.device import DeviceTransfer, Path
from kvkeep.transfer.lanes import CudaLane
from kvkeep.transfer.memcpy import CopyMover
from kvkeep.transfer.moves import Mover, Part
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.probe import probe
from kvkeep.transfer.reference import ReferenceTransfer
from kvkeep.transfer.staged import StagedTransfer
from kvkeep.transfer.transfer import Transfer

try:
    from kvkeep.transfer.kernels import PROGRAMS, KernelMover
except ImportError as _error:  # Triton is an extra, and is not made for every machine
    _WITHOUT_TRITON = str(_error)
else:
    _WITHOUT_TRITON = ""

log = logging.getLogger("kvkeep")


class Opened(NamedTuple):
    """A transfer, what locks the pool for it (None: nothing needs to), and what people should know about it."""

    transfer: Transfer
    pin_calls: PinCalls | None
    text: str


def open_transfer(groups: Sequence[GroupCaches], chunk_tokens: int, kept: File) -> Opened:
    """The transfer for these caches; `kept` is the file in which this host keeps what it measured.

    Raises LayoutMismatch, naming the layer, for a cache that has no dense pages.
    """
    device = next(iter(groups[0].caches.values())).device
    if device.type == "cpu":
        return Opened(ReferenceTransfer(groups, chunk_tokens), None, "NumPy")
    library = load_driver() if device.type == "cuda" else None
    if library is None or _WITHOUT_TRITON:
        why = _WITHOUT_TRITON or f"{device.type} is not CUDA"
        return Opened(StagedTransfer(groups, chunk_tokens), None, f"staging copies, slower: {why}")
    movers = _Movers(device, CudaDriver(library))
    choice = movers.choice(kept)
    transfer = DeviceTransfer(groups, chunk_tokens, partial(movers.paths, choice))
    return Opened(transfer, CudaMemory(library, device.index or 0).calls, str(choice))


class _Movers:
    """The two ways to copy on one CUDA device."""

    def __init__(self, device: torch.device, driver: CudaDriver) -> None:
        self._device = device
        self._driver = driver

    def kernel(self, parts: Sequence[Part]) -> Mover:
        return KernelMover(parts, self._device, PROGRAMS)

    def engine(self, parts: Sequence[Part]) -> Mover:
        return CopyMover(parts, self._driver, self._stream)

    def choice(self, kept: File) -> Choice:
        """What this host measured for such a device, now if it has not yet."""
        name = str(torch.cuda.get_device_name(self._device))
        choice = read_choice(kept, name)
        if choice is None:
            choice = decide(name, probe(self._device, CudaLane(self._device), self.kernel, self.engine))
            if not write_choice(kept, choice):
                log.info("kvkeep: %s cannot be written: the device is measured again at the next start", kept)
        return choice

    def paths(self, choice: Choice, parts: tuple[Part, ...]) -> tuple[Path, Path]:
        """The way that is right for the largest pages, where most bytes are, with a lane for each direction."""
        page_nbytes = max(part.pages.nbytes for part in parts)
        made: dict[str, Callable[[Sequence[Part]], Mover]] = {"kernel": self.kernel, "engine": self.engine}
        to_pool, from_pool = (made[choice.way(direction, page_nbytes)](parts) for direction in (True, False))
        return Path(to_pool, CudaLane(self._device)), Path(from_pool, CudaLane(self._device))

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)
