"""Opening the disk tier: what is in its way is said at once, with a cure, and told to whoever asks for figures."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import Disk
from kvkeep.errors import TierOwned, TierUnavailable
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.testing.suites.tiers import key, write_of
from kvkeep.tiers import open as opening
from kvkeep.tiers.disk.boot import refuse_foreign
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.open import open_tiers
from kvkeep.tiers.tier import OPENING

NOBODY = 65534


def options(root: Path) -> Disk:
    return Disk(path=(str(root),), size=1 << 20, min_free=0)


# ---- whose directory


@pytest.mark.parametrize(
    ("mode", "user", "group"),
    [
        (0o777, None, None),
        (0o1777, None, None),
        (0o702, None, None),
        (0o770, None, NOBODY),
        (0o700, NOBODY, None),
        (0o755, NOBODY, NOBODY),
    ],
)
def test_a_directory_that_others_can_write_to_is_refused_by_name(
    run: Any, opened: Any, root: Path, mode: int, user: int | None, group: int | None
) -> None:
    if (user is not None or group is not None) and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    root.mkdir()
    os.chown(root, -1 if user is None else user, -1 if group is None else group)
    root.chmod(mode)

    async def test() -> None:
        with pytest.raises(TierUnavailable, match=rf"{root} .*give kvkeep a directory of its own, as {root}/kvkeep"):
            async with opened():
                pass
        assert list(root.iterdir()) == [], "nothing was made in it"
        assert root.stat().st_mode & 0o7777 == mode, "it is not ours to change"
        below = Disk(path=(f"{root}/kvkeep",), size=1 << 20, min_free=0)
        tier = await opening.open_disk(below)  # what the message says
        await tier.aclose()

    run(test)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_directory_of_this_user_that_others_can_only_read_is_taken(
    run: Any, opened: Any, root: Path, mode: int
) -> None:
    root.mkdir()
    root.chmod(mode)

    async def test() -> None:
        async with opened():
            pass

    run(test)


@pytest.mark.parametrize(
    ("found", "ids", "taken"),
    [
        ((0o775, 7, 7), (7, 7), True),  # a user and a group of one number, as most systems make them
        ((0o775, 7, 100), (7, 100), False),  # "users": others are in it
        ((0o777, 7, 7), (7, 7), False),
        ((0o755, 0, 0), (7, 7), True),  # root can do all of it anyway
        ((0o775, 0, 0), (7, 7), False),
        ((0o755, 7, 7), (0, 0), False),  # root over a user's directory
        ((0o775, 0, 0), (0, 0), True),
    ],
)
def test_whose_directory_is_taken(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int, int], ids: tuple[int, int], taken: bool
) -> None:
    mode, user, group = found
    real = os.stat_result((0o040000 | mode, 1, 1, 1, user, group, 0, 0, 0, 0))
    monkeypatch.setattr(os, "stat", lambda path: real)
    monkeypatch.setattr(os, "geteuid", lambda: ids[0])
    monkeypatch.setattr(os, "getegid", lambda: ids[1])
    if taken:
        refuse_foreign("/d")
    else:
        with pytest.raises(TierUnavailable, match="/d "):
            refuse_foreign("/d")


# ---- what is in its way


def test_a_directory_that_is_in_use_is_named_at_once_with_its_owner_and_taken_when_it_is_free(
    run: Any, opened: Any, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "SOON_S", 0.0)
    monkeypatch.setattr(opening, "LATER_PAUSE_S", 0.0)
    told: list[tuple[str, str]] = []
    taken: list[DiskTier] = []

    async def take(name: str, tier: Any, *_: object) -> None:
        assert name == "disk"
        taken.append(tier)

    async def test() -> None:
        async with opened():
            task = asyncio.create_task(open_tiers([options(root)], take, lambda *said: told.append(said)))
            while len(told) < 3:
                await asyncio.sleep(0)
            assert not taken
        await task
        await taken[0].aclose()

    with caplog.at_level(logging.INFO, "kvkeep.store"):
        run(test)
    owner = f"{root} belongs to another process (pid {os.getpid()}): give this one a directory of its own"
    assert told[0] == ("disk", OPENING)
    assert set(told[1:]) == {("disk", owner)}
    said = [(one.levelname, one.getMessage()) for one in caplog.records if one.levelno > logging.INFO]
    assert said == [
        ("WARNING", f"no disk tier until its directory is free: {owner}"),
        ("ERROR", f"there is still no disk tier: {owner}"),
    ]


def test_an_owner_that_could_not_write_its_name_is_not_named(run: Any, opened: Any, root: Path) -> None:
    async def test() -> None:
        async with opened():
            (root / "lock").write_bytes(b"\xff")
            with pytest.raises(TierOwned, match="another process: give"):
                async with opened():
                    pass

    run(test)


def test_a_directory_that_cannot_be_made_is_named_with_a_cure(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told: list[tuple[str, str]] = []

    async def take(*_: object) -> None:
        raise AssertionError("there is nothing to take")

    async def test() -> None:
        await open_tiers([options(tmp_path / "file" / "d")], take, lambda *said: told.append(said))

    run(test)
    assert [name for name, _ in told] == ["disk", "disk"]
    assert "set disk_path to another directory" in told[1][1]
    assert str(tmp_path / "file") in told[1][1]


def test_too_little_room_is_said_at_the_start_with_both_sizes(
    run: Any, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        disk = FaultyDisk(free=lambda: 30 << 20)
        async with opened(disk.files, size=100 << 20, min_free=10 << 20) as tier:
            assert tier.figures().short_nbytes == 80 << 20
            assert len(caplog.records) == 1
            for part in ("disk_size gives it 100 MiB", "disk_min_free leaves 10 MiB", "room for 20 MiB", "lower, or"):
                assert part in caplog.text
            caplog.clear()
        disk.free = lambda: 110 << 20
        async with opened(disk.files, size=100 << 20, min_free=10 << 20) as tier:
            assert (tier.figures().short_nbytes, caplog.text) == (0, "")

    run(test)


def test_what_is_there_already_counts_as_room(run: Any, opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    write = write_of(key(1), (4096,) * 100)

    async def test() -> None:
        async with opened() as tier:
            await tier.store([write])
        disk = FaultyDisk(free=lambda: (1 << 20) - (400 << 10))
        async with opened(disk.files) as tier:
            assert (tier.figures().short_nbytes, caplog.text) == (0, "")

    run(test)


def test_a_disk_that_is_full_now_and_then_is_said_seldom(
    run: Any, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        disk = FaultyDisk()
        async with opened(disk.files) as tier:
            for number in range(100):
                disk.fault = lambda call, _: errno.ENOSPC if call == "create" else 0
                await tier.store([write_of(key(1), (4096,))])
                assert tier.figures().degraded
                disk.fault = lambda _call, _path: 0
                await tier.store([write_of(key(number + 2), (4096,))])
                assert not tier.figures().degraded
            assert tier.figures().errors == 100

    run(test)
    assert len(caplog.records) == 7  # 1, 2, 4 ... 64
    assert "free some space" in caplog.text
