from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvkeep.store.namespaces import MOST, Named
from kvkeep.tiers.holding import DiskOptions
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining
from kvkeep.wire.identities import FILE, read_identities, write_identities
from kvkeep.wire.process import join_shared

LIMIT_S = 20.0
KNOWN = {bytes([n]) * 16: Named(f"vllm {n}", f"model  {n}\nkv_dtype  'bfloat16'") for n in range(MOST)}


def test_what_is_written_is_read_in_its_order(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}").touch(0o600)  # of one that was killed
    write_identities(tmp_path, KNOWN)
    assert list(read_identities(tmp_path).items()) == list(KNOWN.items())
    assert [one.name for one in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("octets", [b"", b"{}", b"[1]", b'[{"namespace":"zz","name":"","identity":""}]', b"\xff" * 9])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, octets: bytes) -> None:
    assert read_identities(tmp_path) == {}
    (tmp_path / FILE).write_bytes(octets)
    assert read_identities(tmp_path) == {}


def lived(folder: Path, namespace: bytes, identity: str) -> str:
    """One life of a store over the same directory, until its session is noted there; what it logged."""
    path = folder / "run" / "store"
    disk = DiskOptions(directories=(str(folder / "disk"),), limit_nbytes=1 << 20, min_free_nbytes=0)
    options = ["--pool-nbytes=1048576", f"--disk={msgspec.json.encode(disk).decode()}"]
    command = [sys.executable, "-m", "kvkeep.wire", f"--socket={path}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "pool of" in process.stderr.readline()
        hello = m.Hello(m.VERSION, "vllm m", namespace, identity, 4096, [])
        client = Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)
        while namespace not in read_identities(folder / "disk"):
            assert client.wait(client.stats(), LIMIT_S) is not None
        process.terminate()
        lines = process.stderr.read()
        assert process.wait(LIMIT_S) == 0
    client.drop()
    return lines


def test_a_start_says_why_nothing_that_was_kept_is_its_own(tmp_path: Path) -> None:
    first = lived(tmp_path, b"a" * 16, "engine_version  '0.32.0'")
    again = lived(tmp_path, b"a" * 16, "engine_version  '0.32.0'")
    later = lived(tmp_path, b"b" * 16, "engine_version  '0.32.1'")
    apart = "engine_version: '0.32.1' here, '0.32.0' there"
    assert apart not in first + again
    assert apart in later
    assert list(read_identities(tmp_path / "disk")) == [b"a" * 16, b"b" * 16]
