from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import ConfigError
from kvkeep.memory.limits import (
    STORE_NBYTES,
    Limit,
    MemoryLimits,
    amount_text,
    check_room,
    read_limits,
    size_text,
    still_beside_nbytes,
)
from kvkeep.settings import parse_size

MIB, GIB = 1 << 20, 1 << 30
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def machine(root: Path, available: int = 64 * GIB, own: str = "", mounts: str = "") -> Path:
    """A fake tree with `available` bytes of 128 GiB free, and this process in the groups of `own`."""
    write(root / "proc/meminfo", f"MemTotal: {128 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB\n")
    write(root / "proc/self/cgroup", own)
    write(root / "proc/self/mountinfo", f"23 1 8:1 / / rw - ext4 /dev/vda rw\n{mounts}\n")
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def group_v2(folder: Path, current: int, stat: str = "", **limits: int | str) -> None:
    write(folder / "memory.current", f"{current}\n")
    write(folder / "memory.stat", stat)
    for name, bound in limits.items():
        write(folder / f"memory.{name}", f"{bound}\n")


def group_v1(folder: Path, used: int, bound: int, stat: str = "") -> None:
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.limit_in_bytes", f"{bound}\n")
    write(folder / "memory.stat", stat)


def test_available_memory_binds(tmp_path: Path) -> None:
    limits = read_limits(machine(tmp_path, available=3 * GIB))
    assert limits.available_nbytes == 3 * GIB
    check_room(3 * GIB, limits, beside_nbytes=0)
    with pytest.raises(ConfigError, match=r"proc/meminfo \(MemAvailable\) leaves 3.00 GiB"):
        check_room(3 * GIB + 1, limits, beside_nbytes=0)


def test_a_store_keeps_its_own_memory_beside_the_pool(tmp_path: Path) -> None:
    """A pool that takes all that is left is killed as soon as its store reads from a disk."""
    limits = MemoryLimits((Limit("memory.max", 140 * MIB, 0),))
    check_room(40 * MIB, limits)
    with pytest.raises(ConfigError, match=r"100\.00 MiB beside it .* set pool_size to at most 40 MiB"):
        check_room(40 * MIB + 1, limits)
    assert STORE_NBYTES >= 100 * 10**6, "docs/reference/shared-store.md says so"


def test_a_store_that_runs_has_a_part_of_its_own_memory_already(tmp_path: Path) -> None:
    assert still_beside_nbytes(tmp_path) == STORE_NBYTES
    write(tmp_path / "proc/self/statm", f"99999 {30 * MIB // 4096} 7 1 0 9 0\n")
    assert still_beside_nbytes(tmp_path) == STORE_NBYTES - 30 * MIB
    write(tmp_path / "proc/self/statm", f"99999 {300 * MIB // 4096} 7 1 0 9 0\n")
    assert still_beside_nbytes(tmp_path) == 0


def test_every_group_up_the_path_binds(tmp_path: Path) -> None:
    machine(tmp_path, own="0::/kubepods/pod/container\n", mounts=V2_MOUNT)
    top = tmp_path / "sys/fs/cgroup"
    group_v2(top / "kubepods/pod/container", GIB, max=40 * GIB, high="max")
    group_v2(top / "kubepods/pod", 5 * GIB, max=8 * GIB)
    group_v2(top / "kubepods", 20 * GIB, max="max")
    limits = read_limits(tmp_path)
    assert [limit.available_nbytes // GIB for limit in limits.limits] == [64, 39, 3]
    with pytest.raises(ConfigError) as caught:
        check_room(4 * GIB, limits)
    text = str(caught.value)
    assert f"{top}/kubepods/pod/memory.max leaves 3.00 GiB (8.00 GiB, of which 5.00 GiB are in use)" in text
    assert "a pool of 4.00 GiB does not fit" in text
    assert "set pool_size to at most 2.9 GiB" in text


def test_memory_high_binds_too(tmp_path: Path) -> None:
    machine(tmp_path, own="0::/a\n", mounts=V2_MOUNT)
    group_v2(tmp_path / "sys/fs/cgroup/a", GIB, max=16 * GIB, high=2 * GIB)
    with pytest.raises(ConfigError, match=r"memory\.high"):
        check_room(2 * GIB, read_limits(tmp_path))


def test_file_cache_does_not_count_as_used(tmp_path: Path) -> None:
    machine(tmp_path, own="0::/a\n", mounts=V2_MOUNT)
    stat = f"anon {GIB}\nfile {9 * GIB}\ninactive_file {4 * GIB}\nactive_file {2 * GIB}\nshmem {3 * GIB}\n"
    group_v2(tmp_path / "sys/fs/cgroup/a", 10 * GIB, stat, max=10 * GIB)
    assert read_limits(tmp_path).available_nbytes == 6 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine(tmp_path, own="0::/a\n", mounts=V2_MOUNT)
    group_v2(tmp_path / "sys/fs/cgroup/a", 3 * GIB, max=2 * GIB)
    with pytest.raises(ConfigError, match=r"leaves 0.00 KiB .* free memory, or raise"):
        check_room(1, read_limits(tmp_path))


def test_version_1_binds_on_the_whole_path(tmp_path: Path) -> None:
    machine(tmp_path, own="5:cpu:/x\n4:memory:/docker/abc\n0::/\n", mounts=V1_MOUNT)
    top = tmp_path / "sys/fs/cgroup/memory"
    group_v1(top / "docker/abc", GIB, 6 * GIB, f"total_inactive_file {GIB // 2}\ninactive_file 1\n")
    group_v1(top / "docker", 2 * GIB, 9223372036854771712)
    limits = read_limits(tmp_path)
    assert limits.available_nbytes == 5 * GIB + GIB // 2
    assert limits.tightest is not None
    assert limits.tightest.file == f"{top}/docker/abc/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("own", "inside"), [("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/../../x", "/")]
)
def test_the_mount_itself_binds_where_the_own_path_is_the_hosts(tmp_path: Path, own: str, inside: str) -> None:
    mount = V1_MOUNT.replace(" / ", f" {inside} ")
    machine(tmp_path, own=f"4:memory:{own}\n", mounts=mount)
    group_v1(tmp_path / "sys/fs/cgroup/memory", GIB, 2 * GIB)
    assert read_limits(tmp_path).available_nbytes == GIB


def test_a_mount_point_may_hold_a_blank(tmp_path: Path) -> None:
    machine(tmp_path, own="0::/a\n", mounts=V2_MOUNT.replace("/sys/fs/cgroup", r"/my\040groups"))
    group_v2(tmp_path / "my groups/a", 0, max=GIB)
    assert read_limits(tmp_path).available_nbytes == GIB


def test_files_that_are_not_there_bind_nothing(tmp_path: Path) -> None:
    limits = read_limits(tmp_path)
    assert limits == MemoryLimits(())
    assert limits.tightest is None
    assert limits.available_nbytes == 0
    check_room(1 << 50, limits)


def test_a_named_file_is_bound_by_its_file_system(tmp_path: Path) -> None:
    machine(tmp_path, available=100 * GIB)
    limit = read_limits(tmp_path, named_in=tmp_path).limits[-1]
    assert limit.file == str(tmp_path)
    assert 0 < limit.available_nbytes <= limit.bound_nbytes
    with pytest.raises(ConfigError, match=str(tmp_path)):
        check_room(limit.available_nbytes + 1, MemoryLimits((limit,)))


def test_this_machine_has_room_for_a_page() -> None:
    check_room(4096)
    assert read_limits().available_nbytes > 0


@settings(max_examples=100, deadline=None)
@given(bound=st.integers(0, 1 << 45), used=st.integers(0, 1 << 45), nbytes=st.integers(1, 1 << 46))
def test_the_cure_cures(bound: int, used: int, nbytes: int) -> None:
    limits = MemoryLimits((Limit("a", 1 << 46, 0), Limit("b", bound, used)))
    if nbytes <= max(0, bound - used) - STORE_NBYTES:
        check_room(nbytes, limits)
        return
    with pytest.raises(ConfigError) as caught:
        check_room(nbytes, limits)
    _, cure, rest = str(caught.value).partition("set pool_size to at most ")
    if bound - used - STORE_NBYTES < MIB:
        assert not cure
    else:
        check_room(parse_size(rest.split(",")[0]), limits)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 MiB"),
        (MIB, "1 MiB"),
        (GIB - 1, "1023 MiB"),
        (GIB, "1.0 GiB"),
        (4 * GIB - 1, "3.9 GiB"),
        (93133 * GIB, "90.9 TiB"),
    ],
)
def test_sizes_are_rounded_down(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.00 KiB"),
        (512, "0.50 KiB"),
        (MIB, "1.00 MiB"),
        (GIB, "1.00 GiB"),
        (-3 * MIB, "-3.00 MiB"),
        (2048 * GIB, "2.00 TiB"),
    ],
)
def test_amounts_have_the_unit_that_suits_them(nbytes: int, text: str) -> None:
    assert amount_text(nbytes) == text
