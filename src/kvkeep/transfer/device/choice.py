"""Kernel or copy engine: measured once a device, decided by page size and direction, kept as a file, shown to people.

Measuring is done elsewhere; here samples become a decision. Knows nothing about torch, devices or how copies are made.
What is set, and not left to measure, needs no file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from kvkeep.home import cache_file

log = logging.getLogger("kvkeep")

Way = Literal["kernel", "copy"]
WORTH = 0.95  # the copy engine is taken from this share of the kernel's rate on: it leaves the model its processors
_VERSION = 3
NEVER = 1 << 62


class Wish(NamedTuple):
    """What is set: the file in which this host keeps what it measured (None: none), the way to copy, the programs."""

    kept: Path | None
    way: Literal["auto", "kernel", "copy"] = "auto"
    programs: int = 16


class Sample(msgspec.Struct, frozen=True):
    """What was measured: a direction, the page size, and the rate (bytes a second) of each way."""

    to_pool: bool
    page_nbytes: int
    kernel_rate: float
    copy_rate: float


class DevicePath(msgspec.Struct, frozen=True):
    """From which page size (bytes) on the copy engine is used, in each direction, on which device and why.

    `programs` is how many the kernel was measured with.
    """

    device: str
    to_pool_nbytes: int
    from_pool_nbytes: int
    samples: tuple[Sample, ...] = ()
    programs: int = 0
    version: int = _VERSION

    def way(self, to_pool: bool, page_nbytes: int) -> Way:
        """How pages of this size are copied."""
        return "copy" if page_nbytes >= (self.to_pool_nbytes if to_pool else self.from_pool_nbytes) else "kernel"

    @property
    def lines(self) -> list[str]:
        """One line a measured size and direction, as "store    4 KiB: kernel 21.0, copy engine 3.1 GB/s: kernel"."""
        names = {"kernel": "kernel", "copy": "copy engine"}
        return [
            f"{'store' if to_pool else 'load':5} {_size(nbytes):>8}: kernel {kernel_rate / 1e9:.1f}, "
            f"copy engine {copy_rate / 1e9:.1f} GB/s: {names[self.way(to_pool, nbytes)]}"
            for to_pool, nbytes, kernel_rate, copy_rate in sorted(
                map(msgspec.structs.astuple, self.samples), key=lambda row: (not row[0], row[1])
            )
        ]

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.device}: {'the kernel' if self.to_pool_nbytes else 'the copy engine'} for all pages, as set"
        best = max(max(sample.kernel_rate, sample.copy_rate) for sample in self.samples)
        return (
            f"{self.device}: copy engine for pages from {_size(self.to_pool_nbytes)} on when storing, "
            f"{_size(self.from_pool_nbytes)} when loading, else the kernel, up to {best / 1e9:.0f} GB/s"
        )


def always(device: str, way: Way) -> DevicePath:
    """The choice that asks no measurement: every page goes this way."""
    nbytes = 0 if way == "copy" else NEVER
    return DevicePath(device, nbytes, nbytes)


def choose(device: str, wish: Wish, measure: Callable[[], Sequence[Sample]], without_kernel: str) -> DevicePath:
    """What is set; else what was kept for this device; else what `measure` finds now, which is kept.

    `without_kernel` says why there is no kernel here (""): then the copy engine takes every page.
    """
    if without_kernel:
        if wish.way != "copy":
            log.warning("kvkeep: the copy engine takes all pages, small ones slowly: %s", without_kernel)
        return always(device, "copy")
    if wish.way != "auto":
        return always(device, "kernel" if wish.way == "kernel" else "copy")
    choice = read_choice(wish.kept, device, wish.programs)
    if choice is None:
        choice = decide(device, measure(), wish.programs)
        if wish.kept is None or not write_choice(wish.kept, choice):
            why = f"{wish.kept} cannot be written" if wish.kept is not None else "there is no home directory"
            log.info("kvkeep: %s: the device is measured again at the next start", why)
    return choice


def decide(device: str, samples: Sequence[Sample], programs: int) -> DevicePath:
    """Return the choice that these samples make: by direction the smallest page from which on `copy` always pays."""
    if not samples:
        raise ValueError("a decision needs samples")
    return DevicePath(
        device,
        _threshold(sample for sample in samples if sample.to_pool),
        _threshold(sample for sample in samples if not sample.to_pool),
        tuple(samples),
        programs=programs,
    )


def _threshold(samples: Iterable[Sample]) -> int:
    threshold = NEVER
    for sample in sorted(samples, key=lambda sample: -sample.page_nbytes):
        if sample.copy_rate < WORTH * sample.kernel_rate:
            break
        threshold = sample.page_nbytes
    return threshold


def default_file() -> Path | None:
    """Where this user's hosts keep what they measured; None for one without a home directory."""
    return cache_file("transfer.json")


def kept_choice(file: Path | None) -> DevicePath | None:
    """What was kept, for whatever device; None where there is nothing that can be used, whatever the file holds."""
    if file is None:
        return None
    try:
        choice = msgspec.json.decode(file.read_bytes(), type=DevicePath)
    except (OSError, msgspec.DecodeError):
        return None
    return choice if choice.version == _VERSION else None


def read_choice(file: Path | None, device: str, programs: int) -> DevicePath | None:
    """What was kept for this device and a kernel of so many programs."""
    choice = kept_choice(file)
    return choice if choice is not None and (choice.device, choice.programs) == (device, programs) else None


def write_choice(file: Path, choice: DevicePath) -> bool:
    """Keeps the choice; whether it could. Readers see the old file or the new one; all ranks may write at once."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(choice), indent=1))
        fresh.replace(file)
    except OSError:
        return False
    return True


def _size(nbytes: int) -> str:
    return "no size" if nbytes == NEVER else f"{nbytes >> 10} KiB" if nbytes >= 1024 else f"{nbytes} B"
