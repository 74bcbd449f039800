"""A store and its client in two containers: namespaces of their own for pids, mounts and IPC, one shared folder.

Neither sees the other's pids: what the store watches are pidfds, and the pool is a descriptor that needs no name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

CHUNK, ROOM = 4096, 8
LIMIT_S = 30.0
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--mount", "--ipc", "--fork", "--kill-child"]
CONTAINER += ["--mount-proc"]
# one process forks a worker that only maps the pool; both hold what is reserved; then the planner may end first
ENGINE = """
import os, sys, subprocess
from kvkeep.memory.region import Region
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining
from kvkeep.wire.start import join_shared
worker = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
planner = os.fork()
if not planner:
    hello = m.Hello(name="engine", namespace=b"n" * 16, identity="", chunk_nbytes=4096, holders=[worker.pid])
    client = Joining(join_shared(sys.argv[1], 20.0), hello).wait(20.0)
    granted = client.wait(client.reserve([bytes([1]) * 32, bytes([2]) * 32]), 20.0)
    with Region.attach(os.dup(client.pool_fd)) as region:
        region.array[granted.offsets[0] : granted.offsets[0] + 4096] = 77
    assert client.wait(client.commit(granted.lease, [0], [b"s"]), 20.0).done == [True]
    print(os.getpid(), worker.pid, flush=True)
    sys.stdin.readline()
    os._exit(0)  # without a goodbye
os.waitpid(planner, 0)
print("planner gone", flush=True)
sys.stdin.readline()
worker.kill()
worker.wait()
print("worker gone", flush=True)
sys.stdin.readline()
"""


def can_unshare() -> bool:
    return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_unshare(), reason="no namespaces may be made here")]


def client(path: Path) -> Client:
    hello = m.Hello(name="test", namespace=b"n" * 16, identity="", chunk_nbytes=CHUNK, holders=[])
    return Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)


def until(control: Client, right: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    end_s = time.monotonic() + LIMIT_S
    while True:
        answer = control.wait(control.stats(check=True), LIMIT_S)
        assert isinstance(answer, m.Stats), control.why_gone
        assert answer.problem == ""
        if right(answer.figures):
            return answer.figures
        assert time.monotonic() < end_s, answer.figures


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A store in a container of its own."""
    path = tmp_path / "run" / "store"
    path.parent.mkdir(mode=0o700)
    command = [
        sys.executable,
        "-m",
        "kvkeep.store",
        f"--socket={path}",
        f"--options={Config(pool_size=ROOM * CHUNK).json()}",
    ]
    with subprocess.Popen([*CONTAINER, *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert "pool of" in process.stderr.readline()
            yield path
        finally:
            process.kill()


def test_the_pool_and_the_end_of_its_users_cross_containers(path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    control = client(path)
    with subprocess.Popen([*CONTAINER, sys.executable, "-c", ENGINE, str(path)], **pipes) as engine:
        assert engine.stdout is not None
        assert engine.stdin is not None
        inside = [int(pid) for pid in engine.stdout.readline().split()]
        assert max(inside) < 100, "these are pids of its own namespace"
        now = until(control, lambda now: now["sessions"] == 2)
        assert (now["chunks"], now["writing_nbytes"]) == (1, CHUNK)
        found = control.wait(control.fetch([bytes([1]) * 32]), LIMIT_S)
        assert isinstance(found, m.Matched)
        pool = os.pread(control.pool_fd, CHUNK, found.offsets[0])
        assert pool == bytes([77]) * CHUNK, "bytes written in one container are read in another"
        control.release(found.lease)
        engine.stdin.write(b"\n")
        assert engine.stdout.readline() == b"planner gone\n"
        now = until(control, lambda now: now["sessions"] == 1)
        assert now["quarantined_nbytes"] == CHUNK, "the worker may still be writing"
        engine.stdin.write(b"\n")
        assert engine.stdout.readline() == b"worker gone\n"
        until(control, lambda now: now["quarantined_nbytes"] == now["lingering"] == 0)
        engine.stdin.write(b"\n")
    control.close()
