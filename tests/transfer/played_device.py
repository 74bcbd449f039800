"""A CUDA device played by the CPU, in a process of its own: what only a device runs is run once without one.

Its streams and events are over at once and its kernels are interpreted, so order and speed are not what it shows: that
the device's tests and benchmark run through, and that bytes are right. Loaded as a pytest plugin, or run with the path of
a benchmark and its options.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import InterpretedFunction

from kvkeep.testing.doubles.device import LOCKS, MemmoveDriver
from kvkeep.transfer.device import cuda, kernels, probe
from kvkeep.transfer.rope import scatter


class Event:
    """Happens when it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at_s = 0.0

    def record(self, _stream: object = None) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return max(1e3 * (other.at_s - self.at_s), 1e-6)


class Stream:
    """Has done everything that was put into it."""

    cuda_stream = 0

    def __init__(self, _device: object = None) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        assert event.at_s, "waits for what was never recorded"

    def wait_stream(self, _other: Stream) -> None:
        pass


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on a device, or page-locked, is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.device:
            return torch.device("cpu")
        given = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(_cpu, args), **{name: _cpu(value) for name, value in given.items()})


def _cpu(given: object) -> object:
    on_device = (isinstance(given, torch.device) and given.type == "cuda") or (
        isinstance(given, str) and given.startswith("cuda")
    )
    return torch.device("cpu") if on_device else given


class Memory:
    """Page-locks whatever it is asked to."""

    def __init__(self, *_given: object) -> None:
        self.calls = LOCKS


def play() -> None:
    """From here on this process has a device. What imports the names that are replaced must come later."""
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.current_stream = lambda *_given: Stream()
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()
    torch.cuda._sleep = torch.cuda.synchronize = lambda *_given: None
    torch.cuda.get_device_name = lambda *_given: "a CPU that plays a device"
    torch.cuda.is_available = lambda: True
    cuda.load_driver, cuda.CudaDriver, cuda.CudaMemory = lambda: None, lambda _library: MemmoveDriver(), Memory
    copy = InterpretedFunction(kernels.copy_pages.fn)
    kernels.KernelCopier = partial(kernels.KernelCopier, kernel=copy)
    kernels.refusal = lambda _device: ""
    turn = InterpretedFunction(scatter.scatter_rotated.fn)
    scatter.RotatingScatter = partial(scatter.RotatingScatter, kernel=turn)
    OnCpu().__enter__()


def pytest_configure() -> None:
    """As a plugin: before any test is imported."""
    play()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fewer turns, shorter texts: nothing races here, and an interpreter is slow."""
    for module in {item.module for item in items}:
        module.TURNS, module.TEXT = 4, (4, 1)


SMALL = {
    "PAGE_SIZES": (4 << 10, 64 << 10),
    "NBYTES": 256 << 10,
    "SMALL_NBYTES": 128 << 10,
    "RUNS": 1,
    "CHUNKS": 1,
    "LAYERS": 4,
    "BLOCKS": 17,
    "SIDE": 8,
}

if __name__ == "__main__":
    play()
    probe.NBYTES, probe.PAGE_SIZES, probe._RUNS = 128 << 10, (4 << 10, 64 << 10), 1
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    names = runpy.run_path(script, run_name="played")
    assert SMALL.keys() <= names.keys(), f"{script} has other sizes"
    names["main"].__globals__.update(SMALL)
    names["main"]()
