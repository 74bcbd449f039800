from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import threading
from itertools import dropwhile

import numpy as np
import pytest

from kvkeep.errors import ConfigError, LeaseExpired, WireError
from kvkeep.memory import region as region_module
from kvkeep.memory.region import Region

PAGE = mmap.PAGESIZE


def make_memfd(nbytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def resident_pages(region: Region) -> int:
    """How many pages are present in this very mapping: bit 63 of the kernel's pagemap."""
    first, count = region.array.ctypes.data // PAGE, -(-region.nbytes // PAGE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read(count * 8), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum())


def test_a_new_region_is_zeroed_writeable_and_of_its_size() -> None:
    with Region.create(3 * PAGE + 5) as region:
        assert region.nbytes == 3 * PAGE + 5
        assert region.array.shape == (region.nbytes,)
        assert region.array.dtype == np.uint8
        assert region.array.flags.writeable
        assert not region.array.any()


def test_two_mappings_see_the_same_bytes() -> None:
    with Region.create(PAGE) as one, Region.attach(os.dup(one.fd), expected_nbytes=PAGE) as two:
        one.array[7] = 42
        assert two.array[7] == 42
        two.array[PAGE - 1] = 9
        assert one.array[PAGE - 1] == 9


@pytest.mark.parametrize("nbytes", [0, PAGE - 1, PAGE + 1, 1 << 30])
def test_nobody_can_resize_a_region(nbytes: int) -> None:
    with Region.create(PAGE) as region, pytest.raises(PermissionError):
        os.ftruncate(region.fd, nbytes)


def flags_of(start: int) -> list[str]:
    """What the kernel knows of the mapping that begins there."""
    with open("/proc/self/smaps") as lines:
        found = dropwhile(lambda line: not line.startswith(f"{start:x}-"), lines)
        return next(line.split() for line in found if line.startswith("VmFlags:"))


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="the kernel has no huge pages")
def test_every_mapping_asks_for_huge_pages() -> None:
    with Region.create(4 << 20) as region, Region.attach(os.dup(region.fd)) as other:
        assert "hg" in flags_of(region.array.ctypes.data)
        assert "hg" in flags_of(other.array.ctypes.data)


def test_nobody_can_add_a_seal_against_writing() -> None:
    with Region.create(PAGE) as region, pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_the_descriptor_is_not_inherited_over_exec() -> None:
    with Region.create(PAGE) as region:
        assert not os.get_inheritable(region.fd)


@pytest.mark.parametrize(
    ("seals", "nbytes", "expected", "reason"),
    [
        (0, PAGE, None, "not sealed"),
        (fcntl.F_SEAL_SHRINK, PAGE, None, "not sealed"),
        (fcntl.F_SEAL_GROW, PAGE, None, "not sealed"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, 0, None, "empty"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, PAGE, 2 * PAGE, "announced"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, PAGE, PAGE - 1, "announced"),
        (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE, PAGE, None, "cannot be mapped"),
    ],
)
def test_a_wrong_descriptor_is_refused_and_closed(seals: int, nbytes: int, expected: int | None, reason: str) -> None:
    fd = make_memfd(nbytes, seals)
    with pytest.raises(WireError, match=reason):
        Region.attach(fd, expected)
    assert not is_open(fd)


def test_a_descriptor_that_is_no_memfd_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    file_fd = os.open(tmp_path / "file", os.O_RDWR)
    read_end, write_end = os.pipe()
    for fd in (file_fd, read_end):
        with pytest.raises(WireError):
            Region.attach(fd)
        assert not is_open(fd)
    os.close(write_end)
    with pytest.raises(WireError):
        Region.attach(file_fd)  # closed already


def test_a_region_that_the_kernel_cannot_make_is_a_config_error() -> None:
    for nbytes in (1 << 62, 1 << 70):
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match="pool_size"):
            Region.create(nbytes)
        assert set(os.listdir("/proc/self/fd")) == before


def test_populate_allocates_exactly_the_pages_and_keeps_the_bytes() -> None:
    with Region.create(64 * PAGE) as region:
        region.array[9 * PAGE] = 5
        assert resident_pages(region) == 1
        region.populate(8 * PAGE + 1, 3 * PAGE)  # touches pages 8 to 11
        assert resident_pages(region) == 4
        assert region.array[9 * PAGE] == 5
        assert int(region.array.sum()) == 5
        region.populate(0, region.nbytes)
        assert resident_pages(region) == 64
        region.populate(3, 0)


def test_populating_is_per_mapping() -> None:
    with Region.create(8 * PAGE) as one, Region.attach(os.dup(one.fd)) as two:
        one.populate(0, one.nbytes)
        assert resident_pages(two) == 0
        two.populate(0, 2 * PAGE)
        assert resident_pages(two) == 2


@pytest.mark.parametrize(("start", "nbytes"), [(-1, 5), (0, PAGE + 1), (PAGE, 1), (5, -1)])
def test_populate_outside_the_region_is_refused(start: int, nbytes: int) -> None:
    with Region.create(PAGE) as region, pytest.raises(ValueError, match="is outside"):
        region.populate(start, nbytes)


def test_an_old_kernel_falls_back_to_allocating_and_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "_populate_piece", lambda _piece: errno.EINVAL)
    monkeypatch.setattr(region_module, "_PIECE_NBYTES", 4 * PAGE)
    with Region.create(16 * PAGE + 5) as region:
        region.array[:] = 7
        region.populate(0, region.nbytes)
        assert (region.array == 7).all()
    with Region.create(16 * PAGE + 5) as region:
        region.populate(PAGE, 6 * PAGE)
        assert resident_pages(region) == 6
        region.populate(PAGE, region.nbytes - PAGE)
        assert resident_pages(region) == 16


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EFAULT, errno.ENOSPC])
def test_populate_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    answers = iter([0, 0, code])
    monkeypatch.setattr(region_module, "_populate_piece", lambda _piece: next(answers))
    monkeypatch.setattr(region_module, "_PIECE_NBYTES", PAGE)
    with (
        Region.create(8 * PAGE) as region,
        pytest.raises(ConfigError, match=f"after {2 * PAGE} of {8 * PAGE} "),
    ):
        region.populate(0, region.nbytes)


def test_populate_reports_an_errno_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "_populate_piece", lambda _piece: errno.EPERM)
    with Region.create(PAGE) as region, pytest.raises(ConfigError, match="does not populate"):
        region.populate(0, PAGE)


def test_populate_takes_the_kernels_error_number() -> None:
    unaligned = np.zeros(2 * PAGE, dtype=np.uint8)
    unaligned = unaligned[1 - unaligned.ctypes.data % PAGE % 2 :]  # an odd address is no page's
    assert unaligned.ctypes.data % PAGE != 0
    assert region_module._populate_piece(unaligned[:PAGE]) == errno.EINVAL


def test_populate_may_run_beside_other_threads() -> None:
    with Region.create(8 << 20) as region:
        thread = threading.Thread(target=region.populate, args=(0, region.nbytes))
        thread.start()
        region.array[::PAGE] = 3
        thread.join()
        assert resident_pages(region) == region.nbytes // PAGE
        assert int(region.array.sum()) == 3 * region.nbytes // PAGE


def test_close_is_idempotent_and_ends_the_descriptor() -> None:
    region = Region.create(PAGE)
    fd = region.fd
    region.close()
    region.close()
    assert region.fd == -1
    assert not is_open(fd)
    with pytest.raises(LeaseExpired):
        _ = region.array


def test_a_second_close_spares_a_descriptor_that_took_the_number() -> None:
    region = Region.create(PAGE)
    number = region.fd
    region.close()
    other = os.open("/dev/null", os.O_RDONLY)
    region.close()
    assert other <= number
    assert is_open(other)
    os.close(other)


def test_a_view_outlives_close_and_its_end_ends_the_mapping() -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:kvkeep-pool" in line for line in maps)

    gc.collect()
    before = mappings()
    region = Region.create(4 * PAGE)
    view = region.array[PAGE:]
    region.close()
    view[:] = 8
    assert mappings() == before + 1
    assert int(view[-1]) == 8
    del view
    assert mappings() == before


def test_a_region_that_nobody_closed_is_a_warning() -> None:
    region = Region.create(PAGE)
    fd = region.fd
    with pytest.warns(ResourceWarning, match="never closed"):
        del region
    assert not is_open(fd)
