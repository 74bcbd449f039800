from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvkeep.config import Config, Disk
from kvkeep.store.identities import FILE, MAX_NBYTES, read_identities, write_identities
from kvkeep.store.namespaces import MOST, Named
from kvkeep.wire import messages as m
from kvkeep.wire.client import Joining
from kvkeep.wire.start import join_shared

LIMIT_S = 20.0
KNOWN = {bytes([n]) * 16: Named(f"vllm {n}", f"model  {n}\nkv_dtype  'bfloat16'") for n in range(MOST)}


def test_what_is_written_is_read_in_its_order(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}").touch(0o600)  # of one that was killed
    write_identities(tmp_path, KNOWN)
    assert list(read_identities(tmp_path).items()) == list(KNOWN.items())
    assert [one.name for one in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "octets",
    [b"", b"{}", b"[1]", b'[{"namespace":"zz","name":"","identity":""}]', b"\xff" * 9, b'[{"x":' + b"[" * 200_000],
)
def test_what_cannot_be_read_is_nothing(tmp_path: Path, octets: bytes) -> None:
    assert read_identities(tmp_path) == {}
    (tmp_path / FILE).write_bytes(octets)
    assert read_identities(tmp_path) == {}


def test_what_is_read_is_as_plain_as_what_a_client_says(tmp_path: Path) -> None:
    write_identities(tmp_path, {bytes(16): Named("a\nb\x1b" + "x" * 999, "m  1\n\x1b" + "😀" * 9999)})
    (named,) = read_identities(tmp_path).values()
    assert named.name.startswith(r"a\nb\x1bx")
    assert len(named.name) == 256
    assert named.identity.startswith("m  1\n" + r"\x1b😀")
    assert len(named.identity.encode()) <= 16 << 10


@pytest.mark.parametrize("where", [FILE, f".{FILE}"])
def test_a_link_leads_nowhere(tmp_path: Path, where: str) -> None:
    """What it names is neither read nor written over; the link makes room for the file."""
    outside, disk = tmp_path / "outside", tmp_path / "disk"
    disk.mkdir()
    write_identities(tmp_path, KNOWN)
    (tmp_path / FILE).rename(outside)
    before = outside.read_bytes()
    (disk / where).symlink_to(outside)
    assert read_identities(disk) == {}
    write_identities(disk, dict(list(KNOWN.items())[:1]))
    assert outside.read_bytes() == before
    assert len(read_identities(disk)) == 1
    assert [one.name for one in disk.iterdir()] == [FILE]


def test_a_fifo_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(read_identities(tmp_path)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert found == [{}], "it waits for somebody to write"
    write_identities(tmp_path, KNOWN)
    assert read_identities(tmp_path) == KNOWN


def test_what_would_be_too_long_to_be_read_is_cut_to_what_was_named_last(tmp_path: Path) -> None:
    names = {bytes([n]) * 16: Named(chr(1) * (MAX_NBYTES // 18), "") for n in range(9)}  # six bytes a character
    write_identities(tmp_path, names)
    assert (tmp_path / FILE).stat().st_size <= MAX_NBYTES
    assert list(read_identities(tmp_path)) == list(names)[-2:]


def lived(folder: Path, namespace: bytes, identity: str) -> str:
    """One life of a store over the same directory, until its session is noted there; what it logged."""
    path = folder / "run" / "store"
    disk = Disk(path=(str(folder / "disk"),), size=1 << 20, min_free=0)
    options = Config(pool_size=1 << 20, tiers=[disk])
    command = [sys.executable, "-m", "kvkeep.store", f"--socket={path}", f"--options={options.json()}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "pool of" in process.stderr.readline()
        hello = m.Hello(name="vllm m", namespace=namespace, identity=identity, chunk_nbytes=4096, holders=[])
        client = Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)
        while namespace not in read_identities(folder / "disk"):
            assert client.wait(client.stats(), LIMIT_S) is not None
        process.terminate()
        lines = process.stderr.read()
        assert process.wait(LIMIT_S) == 0
    client.drop()
    return lines


@pytest.mark.process
def test_a_start_says_why_nothing_that_was_kept_is_its_own(tmp_path: Path) -> None:
    first = lived(tmp_path, b"a" * 16, "engine_version  '0.32.0'")
    again = lived(tmp_path, b"a" * 16, "engine_version  '0.32.0'")
    later = lived(tmp_path, b"b" * 16, "engine_version  '0.32.1'")
    apart = "engine_version: '0.32.1' here, '0.32.0' there"
    assert apart not in first + again
    assert apart in later
    assert list(read_identities(tmp_path / "disk")) == [b"a" * 16, b"b" * 16]
