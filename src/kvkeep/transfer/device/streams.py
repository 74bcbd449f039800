"""Runs copies beside the model's own work: a stream for each direction, ordered by events, never by a synchronization.

Knows nothing about blocks, chunks or how bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
import torch


class CopyEvent(Protocol):
    """Completes with the copies of one batch. Until `done` their memory, in the pool and in the engine, must stay."""

    def done(self) -> bool:
        """Whether every copy is complete; never waits."""

    def wait(self) -> None:
        """Returns once every copy is complete; other work on the device is not waited for."""

    def order(self) -> None:
        """Makes what is launched on the current stream from here on run after the copies; the caller does not wait."""


class CopyStream(Protocol):
    """Runs the copies of one direction, batch after batch."""

    def run(self, start: Callable[[], None]) -> CopyEvent:
        """Call `start`, which launches copies; they run after everything launched on the current stream until now."""


class CudaCopyEvent:
    """A `CopyEvent` that is a CUDA event."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def done(self) -> bool:
        """As `CopyEvent.done`."""
        return bool(self._event.query())

    def wait(self) -> None:
        """As `CopyEvent.wait`; the thread sleeps meanwhile. Bounded only by CUDA's own end of a lost device."""
        self._event.synchronize()

    def order(self) -> None:
        """As `CopyEvent.order`."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaStream:
    """A `CopyStream` that is a CUDA stream of its own.

    Every batch waits for the compute stream: a gather reads what the step has written, and a scatter writes into
    blocks that an earlier step may still be reading.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, start: Callable[[], None]) -> CopyEvent:
        """As `CopyStream.run`."""
        before = torch.cuda.Event()
        before.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(before)
        complete = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            started = False
            try:
                start()
                started = True
            finally:
                if not started:  # nobody gets an event to wait for, and what was launched may still use its memory
                    self._stream.synchronize()
            complete.record(self._stream)
        return CudaCopyEvent(complete, self._device)


def upload(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, in the order of the current stream and without waiting for it.

    Torch keeps the page-locked source until it was read.
    """
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
