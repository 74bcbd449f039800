"""Chooses the transfer for a cache's device, and what page-locks the pool for it. Only this module asks what is there.

NumPy on a CPU; kernel (where Triton is) and copy engine on a CUDA device; staging copies anywhere else. Knows nothing
about plans, pools or the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.device.choice import DevicePath, Sample, Wish, choose
from kvkeep.transfer.device.cuda import CudaDriver, CudaMemory, load_driver
from kvkeep.transfer.device.device import DeviceTransfer, Direction, MakeRotating
from kvkeep.transfer.device.memcpy import MemcpyCopier
from kvkeep.transfer.device.probe import probe
from kvkeep.transfer.device.streams import CudaStream
from kvkeep.transfer.device.tables import PageCopier, Part
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.staged import StagedTransfer
from kvkeep.transfer.transfer import Opened

try:
    from kvkeep.transfer.device.kernels import KernelCopier, refusal
    from kvkeep.transfer.rope.scatter import RotatingScatter
except ImportError as _error:  # Triton is an extra, and is not made for every machine
    _WITHOUT_TRITON = str(_error)
else:
    _WITHOUT_TRITON = ""


def open_transfer(groups: Sequence[GroupCaches], chunk_tokens: int, wish: Wish) -> Opened:
    """The transfer for these caches, by `wish` where they are on a CUDA device.

    Raises LayoutMismatch, naming the layer, for a cache that has no dense pages.
    """
    device = next(iter(groups[0].caches.values())).device
    if device.type == "cpu":
        return Opened(ReferenceTransfer(groups, chunk_tokens), None, "NumPy")
    library = load_driver() if device.type == "cuda" else None
    if library is None:
        return Opened(
            StagedTransfer(groups, chunk_tokens), None, f"staging copies, slower: {device} has no CUDA driver"
        )
    ways = _CopyWays(device, CudaDriver(library), wish.programs)
    without_kernel = _WITHOUT_TRITON or refusal(device)
    choice = choose(str(torch.cuda.get_device_name(device)), wish, ways.measure, without_kernel)
    make_rotating: MakeRotating | None = None if without_kernel else partial(RotatingScatter, programs=wish.programs)
    transfer = DeviceTransfer(groups, chunk_tokens, partial(ways.directions, choice), make_rotating)
    return Opened(transfer, CudaMemory(library, device.index or 0).calls, str(choice))


def open_with_states(groups: Sequence[GroupCaches], states: Sequence[GroupCaches], chunk_tokens: int) -> Opened:
    """The transfers for the caches of a model with recurrent state, whose blocks are `states`: NumPy or staging copies.

    Raises LayoutMismatch as `open_transfer` does.
    """
    on_cpu = next(iter(groups[0].caches.values())).device.type == "cpu"
    made = ReferenceTransfer if on_cpu else StagedTransfer
    text = "NumPy" if on_cpu else "staging copies: recurrent state has no path of its own on a device"
    return Opened(made(groups, chunk_tokens), None, text, made(states, states[0].block_tokens))


class _CopyWays:
    """The two ways to copy on one CUDA device."""

    def __init__(self, device: torch.device, driver: CudaDriver, programs: int) -> None:
        self._device = device
        self._driver = driver
        self._programs = programs

    def kernel(self, parts: Sequence[Part]) -> PageCopier:
        copier = KernelCopier(parts, self._device, self._programs)
        copier.prepare()
        return copier

    def copy(self, parts: Sequence[Part]) -> PageCopier:
        return MemcpyCopier(parts, self._driver, self._stream)

    def measure(self) -> list[Sample]:
        return probe(self._device, CudaStream(self._device), self.kernel, self.copy)

    def directions(self, choice: DevicePath, parts: tuple[Part, ...]) -> tuple[Direction, Direction]:
        """Make both directions as `choice` says for the largest pages, where most bytes are."""
        page_nbytes = max(part.pages.nbytes for part in parts)
        made: dict[str, Callable[[Sequence[Part]], PageCopier]] = {"kernel": self.kernel, "copy": self.copy}
        to_pool, from_pool = (made[choice.way(direction, page_nbytes)](parts) for direction in (True, False))
        return Direction(to_pool, CudaStream(self._device)), Direction(from_pool, CudaStream(self._device))

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)
