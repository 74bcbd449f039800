from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvkeep.transfer.memcpy import CudaDriver

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
