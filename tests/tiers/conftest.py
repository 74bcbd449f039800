"""What the tests of the disk tier share: a tier on a temporary directory, opened and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config import Disk
from kvkeep.tiers.disk.directio import Files
from kvkeep.tiers.disk.disk import DiskTier, open_disk

Opened = Callable[..., AbstractAsyncContextManager[DiskTier]]
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def run() -> Run:
    """Runs a test's coroutine, for at most a minute."""

    def runs(test: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await test()

        asyncio.run(limited())

    return runs


@pytest.fixture
def opened(root: Path) -> Opened:
    """A tier on `root` that has looked through it (unless `at_once`); with a clock that goes on by one."""
    clock = count(1)

    @asynccontextmanager
    async def make(files: Files | None = None, at_once: bool = False, **changes: Any) -> AsyncIterator[DiskTier]:
        settings = {"path": (str(root),), "size": 1 << 20, "min_free": 0} | changes
        tier = await open_disk(Disk(**settings), files, lambda: next(clock))
        try:
            if not at_once:
                await tier.wait_for_scan()
            yield tier
        finally:
            await tier.aclose()

    return make
