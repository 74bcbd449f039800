"""A store that serves while its tier is still being opened: its misses say so, and say something else afterwards."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvkeep.config import Config, Disk
from kvkeep.errors import StoreGone
from kvkeep.telemetry import Miss
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

pytestmark = pytest.mark.process

CHUNK, LIMIT_S = 4096, 20.0


def joined(process: subprocess.Popen[bytes], path: Path) -> Client:
    hello = m.Hello(
        name="test", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[os.getpid()], sizes=[CHUNK]
    )
    while process.poll() is None:
        try:
            return Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)
        except StoreGone:
            continue  # it does not listen yet
    raise AssertionError("the store ended")


def why(client: Client) -> Miss | None:
    answer = client.wait(client.fetch([b"d" * 32], LIMIT_S), LIMIT_S)
    assert isinstance(answer, m.Matched)
    return answer.why


def test_a_miss_before_the_disk_is_open_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    tier = Disk(path=(str(disk),), size=1 << 20, min_free=0)
    options = Config(pool_size=8 * CHUNK, log_level="error", tiers=[tier])
    command = [sys.executable, "-m", "kvkeep.store", f"--socket={tmp_path / 'store'}", f"--options={options.json()}"]
    with open(disk / "lock", "wb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        process = subprocess.Popen(command)
        client = joined(process, tmp_path / "store")
        assert why(client) is Miss.TIER_OPENING
    end_s = time.monotonic() + LIMIT_S
    while why(client) is Miss.TIER_OPENING:
        assert time.monotonic() < end_s, "the disk is not opened"
    assert why(client) is Miss.NOT_STORED
    client.close()
    process.terminate()
    assert process.wait(LIMIT_S) == 0
