"""Kernel or copy engine: measured once a device, decided by page size and direction, kept as a file, shown to people.

Measuring is done elsewhere; here samples become a decision. Knows nothing about torch, devices or how copies are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

Way = Literal["kernel", "engine"]
WORTH = 0.95  # the engine is taken where it reaches this share of the kernel's rate: it leaves the model its processors
_VERSION = 1


class Sample(msgspec.Struct, frozen=True):
    """What was measured: a direction, the page size, and the rate (bytes a second) of each way."""

    to_pool: bool
    page_nbytes: int
    kernel_rate: float
    engine_rate: float


class Choice(msgspec.Struct, frozen=True):
    """From which page size (bytes) on the copy engine is used, in each direction, on which device and why."""

    device: str
    to_pool_nbytes: int
    from_pool_nbytes: int
    samples: tuple[Sample, ...] = ()
    version: int = _VERSION

    def way(self, to_pool: bool, page_nbytes: int) -> Way:
        """How pages of this size are copied."""
        return "engine" if page_nbytes >= (self.to_pool_nbytes if to_pool else self.from_pool_nbytes) else "kernel"

    def __str__(self) -> str:
        best = max((sample.kernel_rate, sample.engine_rate) for sample in self.samples) if self.samples else (0, 0)
        rate = f", up to {max(best) / 1e9:.0f} GB/s" if self.samples else " (not measured)"
        return (
            f"{self.device}: copy engine for pages from {_size(self.to_pool_nbytes)} on when storing, "
            f"{_size(self.from_pool_nbytes)} when loading, else the kernel{rate}"
        )


NEVER = 1 << 62


def unmeasured(device: str) -> Choice:
    """What is used without a measurement: the copy engine from 256 KiB on, where a call a page no longer shows."""
    return Choice(device, 256 << 10, 256 << 10)


def decide(device: str, samples: Sequence[Sample]) -> Choice:
    """The choice that these samples make: in each direction the smallest page from which on the engine always pays."""
    assert samples, "a decision needs samples"
    return Choice(
        device,
        _threshold(sample for sample in samples if sample.to_pool),
        _threshold(sample for sample in samples if not sample.to_pool),
        tuple(samples),
    )


def _threshold(samples: Iterable[Sample]) -> int:
    threshold = NEVER
    for sample in sorted(samples, key=lambda one: -one.page_nbytes):
        if sample.engine_rate < WORTH * sample.kernel_rate:
            break
        threshold = sample.page_nbytes
    return threshold


def read_choice(file: Path, device: str) -> Choice | None:
    """What was kept for this device; None where there is nothing that can be used, whatever the file holds."""
    try:
        choice = msgspec.json.decode(file.read_bytes(), type=Choice)
    except (OSError, msgspec.DecodeError):
        return None
    return choice if (choice.device, choice.version) == (device, _VERSION) else None


def write_choice(file: Path, choice: Choice) -> bool:
    """Keeps the choice; whether it could. Readers see the old file or the new one."""
    fresh = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(choice), indent=1))
        fresh.replace(file)
    except OSError:
        return False
    return True


def _size(nbytes: int) -> str:
    return "no size" if nbytes == NEVER else f"{nbytes >> 10} KiB" if nbytes >= 1024 else f"{nbytes} B"
