"""The CUDA driver's calls that torch does not have: batched copies, and page-locking memory that is not torch's.

`libcuda.so.1` comes with every driver, so nothing is to be installed; and its errors, unlike the runtime's, do not show
up in torch's next call. Knows nothing about blocks, pools or streams' order. Sources: the CUDA driver API's reference,
cuda.h of CUDA 11.8, 12.8 and 13.0.
"""

from __future__ import annotations

import ctypes
from typing import Any

from kvkeep.memory.page_lock import PinCalls
from kvkeep.transfer.device.tables import Int64Array

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP
_SAME_ADDRESS = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM


def load_driver() -> Any:
    """The driver's library; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


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

    def copy(self, targets: Int64Array, sources: Int64Array, sizes: Int64Array, stream: int) -> None:
        """As `Driver.copy`; the arrays are read before it returns."""
        if self._batched:
            self._check(self._batched, self._batch(targets, sources, sizes, stream))
            return
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            code = self._library.cuMemcpyAsync(
                ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
            )
            self._check("cuMemcpyAsync", code)

    def _batch(self, targets: Int64Array, sources: Int64Array, sizes: Int64Array, stream: int) -> int:
        """One call with one set of attributes for all; CUDA 12's form has a place for the index of a failed copy."""
        attributes, first, failed = _Attributes(order=_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
        arrays = (ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes))
        count, sets = ctypes.c_size_t(len(sizes)), ctypes.c_size_t(1)
        rest = () if self._batched.endswith("_v2") else (ctypes.byref(failed),)
        call = getattr(self._library, self._batched)
        return int(
            call(*arrays, count, ctypes.byref(attributes), ctypes.byref(first), sets, *rest, ctypes.c_void_p(stream))
        )

    def _check(self, name: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")


class CudaMemory:
    """Page-locks memory for one device, from any thread; `library` as for `CudaDriver`, `device` is its index.

    The device's primary context, the one that torch uses, is current during a call only.
    """

    def __init__(self, library: Any, device: int) -> None:
        self._library = library
        self._device = device
        self._context = ctypes.c_void_p()

    @property
    def calls(self) -> PinCalls:
        """For `memory.page_lock`."""
        return PinCalls(self._lock, self._unlock)

    def _lock(self, address: int, nbytes: int) -> str:
        return self._attach() or self._in_context(
            "cuMemHostRegister_v2",
            ctypes.c_void_p(address),
            ctypes.c_size_t(nbytes),
            ctypes.c_uint(_PORTABLE_AND_MAPPED),
        )

    def _unlock(self, address: int) -> str:
        return self._in_context("cuMemHostUnregister", ctypes.c_void_p(address))

    def _attach(self) -> str:
        """Takes hold of the context once; refuses a machine on which the device sees locked memory elsewhere."""
        if self._context:
            return ""
        same = ctypes.c_int()
        code = self._library.cuDeviceGetAttribute(ctypes.byref(same), ctypes.c_int(_SAME_ADDRESS), self._device)
        if code or not same.value:
            return "the device cannot use host memory at the host's own address"
        return self._text(
            "cuDevicePrimaryCtxRetain",
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), self._device),
        )

    def _in_context(self, name: str, *given: Any) -> str:
        if code := self._library.cuCtxPushCurrent_v2(self._context):
            return self._text("cuCtxPushCurrent_v2", code)
        try:
            return self._text(name, getattr(self._library, name)(*given))
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _text(self, name: str, code: int) -> str:
        return f"{name}: CUDA error {code}" if code else ""
