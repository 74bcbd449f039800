"""`CacheEngine` over a disk: prefixes whose chunks lie partly in the pool and partly below it, in both modes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.engine.link import source_of
from kvkeep.errors import TierUnavailable

from .library import CHUNK, LAYOUTS, Library, library

pytestmark = pytest.mark.process

HERE = list(range(1, 37))
THERE = list(range(79, 43, -1))
COUNT = 6 * CHUNK
LIMIT_S = 20.0


@pytest.fixture
def lib(tmp_path: Path) -> Iterator[Library]:
    """An engine whose pool has room for eight chunks, above a disk that has room for all."""
    groups = LAYOUTS["groups of different shape"]()
    with library(groups) as sizing:
        chunk_nbytes = sizing.engine._shard.nbytes
    config = Config(
        pool_size=8 * chunk_nbytes,
        disk_path=str(tmp_path),
        disk_size="64 MiB",
        disk_min_free="1 MiB",
        max_pinned_share=1.0,
        log_level="error",
    )
    with library(groups, source_of(config, chunk_nbytes, CHUNK), verify_pool="always") as made:
        made.fill(1)
        yield made


def until(lib: Library, there: Callable[[dict[str, int]], bool]) -> None:
    """Asks the store until its figures are so."""
    end = time.monotonic() + LIMIT_S
    while not there(figures := lib.engine.store_figures()):
        assert time.monotonic() < end, figures


def stored(lib: Library, tokens: range) -> None:
    """Stored, and written to the disk."""
    before = lib.engine.store_figures()
    until(lib, lambda now: "disk_flush_stored" in now)  # the disk is open
    kept = before.get("disk_flush_stored", 0) + lib.engine.store(tokens, lib.table(HERE, len(tokens))) // CHUNK
    until(lib, lambda now: now["disk_flush_stored"] == kept)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("in_pool", [(), (0, 1, 4), (2, 3, 5)])
def test_a_prefix_split_between_pool_and_disk_arrives_whole(lib: Library, in_pool: tuple[int, ...], layerwise: bool):
    stored(lib, range(COUNT))
    stored(lib, range(1000, 1000 + 8 * CHUNK))  # displaces all of it
    assert lib.engine.store_figures()["chunks"] == 8
    here, there = lib.table(HERE, COUNT), lib.table(THERE, COUNT)
    for place in in_pool:  # these are in the pool again, and on the disk they are still
        mask = [n >= place * CHUNK for n in range((place + 1) * CHUNK)]
        part = lib.table(HERE, len(mask))
        assert lib.engine.store(range(len(mask)), part, mask) == CHUNK
    before = lib.pages()
    if layerwise:
        announced, *_, arrived = lib.engine.retrieve_layer(range(COUNT), there)
        assert announced == COUNT
    else:
        arrived = lib.engine.retrieve(range(COUNT), there)
    assert arrived.all()
    assert lib.pages() == lib.after(before, here, there, arrived)
    assert lib.engine.store_figures()["promoted"] == 6 - len(in_pool)
    lib.settled()


def test_what_a_disk_has_no_more_ends_the_mask(lib: Library, tmp_path: Path):
    stored(lib, range(COUNT))
    stored(lib, range(1000, 1000 + 8 * CHUNK))
    files = sorted((one for one in tmp_path.rglob("*") if one.is_file() and one.stat().st_size > 4096), key=_age)
    for file in files[2:4]:
        file.write_bytes(bytes(file.stat().st_size))
    before, there = lib.pages(), lib.table(THERE, COUNT)
    arrived = lib.engine.retrieve(range(COUNT), there)
    assert arrived.tolist() == [n < 2 * CHUNK for n in range(COUNT)]
    assert lib.pages() == lib.after(before, lib.table(HERE, COUNT), there, arrived)
    lib.settled()


def test_cleared_is_cleared_on_the_disk_too(lib: Library):
    stored(lib, range(COUNT))
    lib.engine.clear()
    assert lib.engine.lookup(range(COUNT)) == 0
    assert not lib.engine.retrieve(range(COUNT), lib.table(THERE, COUNT)).any()


def test_a_clear_that_the_disk_cannot_keep_says_so(lib: Library, tmp_path: Path):
    """Its epochs cannot be replaced: in their place is a directory that is not empty."""
    stored(lib, range(COUNT))
    (tmp_path / "epochs").unlink()
    (tmp_path / "epochs" / "full").mkdir(parents=True)
    with pytest.raises(TierUnavailable, match=r"chunks were dropped, and not for good: tier disk: .*clear again"):
        lib.engine.clear()
    assert lib.engine.lookup(range(COUNT)) == 0
    (tmp_path / "epochs" / "full").rmdir()
    (tmp_path / "epochs").rmdir()
    assert lib.engine.clear() == 0


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns
