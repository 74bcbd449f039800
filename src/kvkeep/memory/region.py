"""A sealed shared-memory mapping: the bytes under the pool.

Knows nothing about what the bytes mean, who is lent which of them, or how a descriptor reaches a process.

The memory is a memfd, so that nothing is left behind when its processes are killed, and it is sealed against
shrinking and growing, so that no peer can turn an access into SIGBUS by truncating it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import warnings
from typing import TYPE_CHECKING, Self

import numpy as np

from kvkeep.errors import ConfigError, LeaseExpired, WireError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy.typing as npt

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_MADV_HUGEPAGE = 14
_REQUIRED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PIECE_NBYTES = 32 << 20  # small enough that "how far it came" means something, large enough to cost nothing
_FULL = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC)

# A CDLL call lets go of the GIL while it runs; mmap.madvise does not, and would stop the process for seconds.
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Region:
    """One mapping of a sealed memfd; make it with `create` or `attach`, end it with `close` or `with`.

    `fd` is the descriptor that other processes may be given, `nbytes` the size that can no longer change.
    """

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.nbytes = len(mapping)
        self._mapping: mmap.mmap | None = mapping
        self._array: npt.NDArray[np.uint8] | None = np.frombuffer(mapping, dtype=np.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Region:
        """Make a new zeroed region of `nbytes`; its pages are allocated by `populate`, or at the first touch.

        Raises ConfigError where the kernel refuses, and for less than a byte.
        """
        if nbytes <= 0:
            raise ConfigError(f"pool_size: no shared memory has {nbytes} bytes")
        fd = -1
        try:
            fd = os.memfd_create("kvkeep-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _REQUIRED_SEALS | fcntl.F_SEAL_SEAL)
            mapping = _map(fd, nbytes)
        except (OSError, OverflowError) as error:
            _close_quietly(fd)
            raise ConfigError(
                f"pool_size: the kernel gives no sealed shared memory of {nbytes} bytes: {error}"
            ) from error
        return cls(fd, mapping)

    @classmethod
    def attach(cls, fd: int, expected_nbytes: int | None = None) -> Region:
        """Map a descriptor received from a peer, and own it from here on, also when it is refused.

        Raises WireError unless it is sealed against shrinking and growing, not empty, and of the right size.
        """
        try:
            _check_descriptor(fd, expected_nbytes)
            mapping = _map(fd, os.fstat(fd).st_size)
        except WireError:
            _close_quietly(fd)
            raise
        except (OSError, ValueError) as error:
            _close_quietly(fd)
            raise WireError(f"the pool's descriptor cannot be mapped: {error}") from error
        return cls(fd, mapping)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole mapping as uint8 [nbytes], writeable; LeaseExpired after `close`."""
        if self._array is None:
            raise LeaseExpired("the region is closed")
        return self._array

    def populate(self, start: int, nbytes: int) -> None:
        """Allocate and map the pages of [start, start + nbytes) for this process; the contents do not change.

        The GIL is free meanwhile, so a thread of its own may do this while others use the region; the region
        must stay open until it returns. Raises ConfigError, with how far it came, where memory runs out, and ValueError
        for bytes outside of the region.
        """
        if not 0 <= start <= start + nbytes <= self.nbytes:
            raise ValueError(f"{start} + {nbytes} is outside {self.nbytes} bytes")
        view = self.array[start - start % mmap.PAGESIZE : start + nbytes]  # pages are whole
        for at in range(0, view.nbytes, _PIECE_NBYTES):
            piece = view[at : at + _PIECE_NBYTES]
            code = _populate_piece(piece)
            if code == errno.EINVAL:  # a kernel older than 5.14
                code = _allocate_and_read(self.fd, start - start % mmap.PAGESIZE + at, piece)
            if code in _FULL:
                raise ConfigError(
                    f"pool_size: memory ran out after {at} of {view.nbytes} bytes ({os.strerror(code)}); "
                    f"set pool_size lower or raise the memory limit"
                )
            if code:
                raise ConfigError(f"pool_size: the kernel does not populate memory: {os.strerror(code)}")

    def close(self) -> None:
        """End the mapping and the descriptor; closing again does nothing.

        Views that are still out keep the mapping alive, and the last of them to be collected ends it:
        unmapping under them would be a crash instead of an error.
        """
        mapping, self._mapping, self._array = self._mapping, None, None
        if mapping is None:
            return
        _close_quietly(self.fd)
        self.fd = -1
        try:
            mapping.close()
        except BufferError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._mapping is not None:
            self.close()
            warnings.warn(f"a region of {self.nbytes} bytes was never closed", ResourceWarning, stacklevel=2)


def _map(fd: int, nbytes: int) -> mmap.mmap:
    """Map it, in huge pages where the machine lends them to shared memory (by default none does).

    A device takes a bounded number of pieces a request: of pages of 4 KiB that is less than it could.
    """
    mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = np.frombuffer(mapping, dtype=np.uint8)
    _LIBC.madvise(view.ctypes.data, view.nbytes, _MADV_HUGEPAGE)  # a kernel without them says EINVAL
    return mapping


def _check_descriptor(fd: int, expected_nbytes: int | None) -> None:
    """Raise WireError for what a peer could still truncate under us, or that is not what it announced."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise WireError(f"the pool's descriptor is no memfd: {error}") from error
    if seals & _REQUIRED_SEALS != _REQUIRED_SEALS:
        raise WireError("the pool's descriptor is not sealed against shrinking and growing")
    nbytes = os.fstat(fd).st_size
    if nbytes == 0:
        raise WireError("the pool's descriptor is empty")
    if expected_nbytes is not None and nbytes != expected_nbytes:
        raise WireError(f"the pool's descriptor has {nbytes} bytes, announced were {expected_nbytes}")


def _populate_piece(piece: npt.NDArray[np.uint8]) -> int:
    """Populate the pages of `piece`, which starts at a page; the error number, or 0."""
    while _LIBC.madvise(piece.ctypes.data, piece.nbytes, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


def _allocate_and_read(fd: int, start: int, piece: npt.NDArray[np.uint8]) -> int:
    """Do the same for an old kernel: allocate, then read one byte a page; the error number, or 0.

    Allocating first makes a full machine an error instead of SIGBUS. Reading maps the page as well as writing
    would, and cannot undo what another process writes at the same moment.
    """
    try:
        os.posix_fallocate(fd, start, piece.nbytes)
    except OSError as error:
        return error.errno or errno.EIO
    piece[:: mmap.PAGESIZE].max()
    return 0


def _close_quietly(fd: int) -> None:
    """Close `fd`, also where it is none: it is given up for good either way."""
    if fd < 0:
        return
    try:
        os.close(fd)
    except OSError:
        return
