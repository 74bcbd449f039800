"""Gather and scatter by the device's copy engines: one asynchronous copy a run of neighbouring blocks.

It takes no multiprocessor from the model, and suits large pages: each copy costs the driver about a microsecond, or
less where the driver takes a batch in one call (CUDA 12.8). Knows nothing about streams' order or leases' owners.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kvkeep.transfer.moves import Job, Numbers, Part, copies, cut, edges_of, merged

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class Driver(Protocol):
    """What starts copies on a stream."""

    def copy(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """Starts copies between addresses (contiguous int64 arrays of one length, in bytes); none depends on another."""


class CopyMover:
    """A `Mover` by copy engine; `stream` gives the handle of the current stream."""

    def __init__(self, parts: Sequence[Part], driver: Driver, stream: Callable[[], int]) -> None:
        self._parts = tuple(parts)
        self._driver = driver
        self._stream = stream

    def start(self, jobs: Sequence[Job], to_pool: bool, only: int | None) -> None:
        """As `Mover.start`."""
        parts = [part for part in self._parts if only is None or part.range_ == only]
        rows = cut(merged(copies(parts, jobs)), edges_of(jobs))
        if not len(rows):
            return
        pages, places, sizes = (np.ascontiguousarray(column) for column in rows.T)
        targets, sources = (places, pages) if to_pool else (pages, places)
        self._driver.copy(targets, sources, sizes, self._stream())


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h."""

    _fields_ = (("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint))


class CudaDriver:
    """The CUDA driver itself (`ctypes.CDLL("libcuda.so.1")`): a batch in one call where it can, else a call a copy.

    The caller's thread must have the device's context, as one that used torch on it has. RuntimeError, as torch's own
    copies raise, if the driver refuses.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._batched = next(
            (name for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync") if hasattr(library, name)), ""
        )

    def copy(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """As `Driver.copy`; the arrays are read before it returns."""
        if self._batched:
            self._check(self._batched, self._batch(targets, sources, sizes, stream))
            return
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            code = self._library.cuMemcpyAsync(
                ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
            )
            self._check("cuMemcpyAsync", code)

    def _batch(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> int:
        """One call with one set of attributes for all; CUDA 12's form has a place for the number of a failed copy."""
        attributes, first, failed = _Attributes(order=_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
        arrays = (ctypes.c_void_p(one.ctypes.data) for one in (targets, sources, sizes))
        count, one = ctypes.c_size_t(len(sizes)), ctypes.c_size_t(1)
        rest = () if self._batched.endswith("_v2") else (ctypes.byref(failed),)
        call = getattr(self._library, self._batched)
        return int(
            call(*arrays, count, ctypes.byref(attributes), ctypes.byref(first), one, *rest, ctypes.c_void_p(stream))
        )

    def _check(self, name: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")
