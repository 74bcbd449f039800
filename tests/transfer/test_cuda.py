from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvkeep.memory.page_lock import PageLock
from kvkeep.transfer.device.cuda import CudaDriver, CudaMemory

Copy = tuple[int, int, int]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def words(pointer: Any, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(pointer.value))


class Cuda11:
    """libcuda.so.1 as far as it is used, without a device: it notes what it is asked for."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.copies: list[Copy] = []
        self.streams: set[int] = set()

    def cuMemcpyAsync(self, target: Any, source: Any, nbytes: Any, stream: Any) -> int:
        self.copies.append((target.value, source.value, nbytes.value))
        self.streams.add(stream.value)
        return self.code


class Cuda12(Cuda11):
    def cuMemcpyBatchAsync(self, *given: Any) -> int:
        targets, sources, sizes, count, attributes, first, kinds, failed, stream = given
        assert failed is not None
        self.batch((targets, sources, sizes), count, (attributes, first, kinds), stream)
        return self.code

    def batch(self, arrays: tuple[Any, ...], count: Any, attributes: tuple[Any, ...], stream: Any) -> None:
        self.copies += zip(*(words(one, count.value) for one in arrays), strict=True)
        assert ctypes.string_at(attributes[0], 24) == bytes([1] + [0] * 23), "in stream order, no hints, no flags"
        assert attributes[1]._obj.value == 0
        assert attributes[2].value == 1
        self.streams.add(stream.value)


class Cuda13(Cuda12):
    def cuMemcpyBatchAsync_v2(self, *given: Any) -> int:
        targets, sources, sizes, count, attributes, first, kinds, stream = given
        self.batch((targets, sources, sizes), count, (attributes, first, kinds), stream)
        return self.code

    def cuMemcpyBatchAsync(self, *given: Any) -> int:
        raise AssertionError("the older form")


@pytest.mark.parametrize("library", [Cuda11, Cuda12, Cuda13])
def test_every_form_of_the_driver_is_asked_for_the_same_copies(library: type[Cuda11]):
    cuda = library()
    CudaDriver(cuda).copy(numbers(1 << 40, 8), numbers(3, 1 << 47), numbers(5, 1 << 33), 77)
    assert cuda.copies == [(1 << 40, 3, 5), (8, 1 << 47, 1 << 33)]
    assert cuda.streams == {77}


@pytest.mark.parametrize("library", [Cuda11, Cuda12, Cuda13])
def test_a_refusal_is_an_error_that_names_the_call(library: type[Cuda11]):
    with pytest.raises(RuntimeError, match=r"cuMemcpy\w*: CUDA error 719"):
        CudaDriver(library(719)).copy(numbers(1), numbers(2), numbers(3), 0)


class CudaHost:
    """The part of libcuda.so.1 that page-locks: a call without a current context is an error, as with the real one."""

    def __init__(self, same_address: int = 1, limit: int = 1 << 40) -> None:
        self.same_address, self.limit = same_address, limit
        self.current: list[int] = []
        self.locked: dict[int, int] = {}

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: int) -> int:
        assert (attribute.value, device) == (91, 3)
        value._obj.value = self.same_address
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        assert device == 3
        context._obj.value = 1234
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current.append(context.value)
        return 0 if context.value else 201

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context._obj.value = self.current.pop()
        return 0

    def cuMemHostRegister_v2(self, address: Any, nbytes: Any, flags: Any) -> int:
        assert (self.current, flags.value) == ([1234], 3)
        if sum(self.locked.values()) + nbytes.value > self.limit:
            return 2
        self.locked[address.value] = nbytes.value
        return 0

    def cuMemHostUnregister(self, address: Any) -> int:
        assert self.current == [1234]
        return 0 if self.locked.pop(address.value, 0) else 713


def test_memory_is_locked_in_the_devices_context_and_no_context_is_left_behind():
    cuda = CudaHost(limit=250)
    pin = PageLock(1 << 47, 300, CudaMemory(cuda, 3).calls, piece_nbytes=100)
    pin.grow(300)
    assert cuda.locked == {1 << 47: 100, (1 << 47) + 100: 100}
    assert pin.refusal == "cuMemHostRegister_v2: CUDA error 2"
    pin.release()
    assert cuda.locked == {}
    assert cuda.current == []
    assert CudaMemory(cuda, 3).calls.unlock(5) == "cuCtxPushCurrent_v2: CUDA error 201"


def test_a_device_that_sees_locked_memory_elsewhere_is_refused():
    cuda = CudaHost(same_address=0)
    assert "at the host's own address" in CudaMemory(cuda, 3).calls.lock(1 << 47, 100)
    assert cuda.locked == {}
