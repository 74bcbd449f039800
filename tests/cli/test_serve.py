"""`kvkeep serve` as an operator meets it: ready at once, says how far it is, ends on SIGTERM and says what it drops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvkeep.cli import serve as serve_module
from kvkeep.cli import stats as stats_module
from kvkeep.cli.main import app
from kvkeep.config import STORE_SETTINGS, Config, Disk, Durability
from kvkeep.store.systemd import notify
from kvkeep.telemetry import Figure
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

LIMIT_S = 20.0
CHUNK = 4096


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """A service manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(LIMIT_S)
        yield sock


def served(folder: Path, *options: str) -> tuple[subprocess.Popen[str], Path]:
    path = folder / "run" / "store"
    return subprocess.Popen(
        [sys.executable, "-m", "kvkeep.cli.main", "serve", f"--socket={path}", "--pool-size=1 MiB", *options],
        env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}, stderr=subprocess.PIPE, text=True,
    ), path  # fmt: skip


def keep(path: Path, *numbers: int, who: tuple[bytes, str] = (b"n", "")) -> Client:
    hello = m.Hello(name="test", namespace=who[0] * 16, identity=who[1], chunk_nbytes=CHUNK, holders=[], sizes=[CHUNK])
    client = Joining(join_shared(str(path), LIMIT_S), hello).wait(LIMIT_S)
    granted = client.wait(client.reserve([bytes([number]) * 32 for number in numbers]), LIMIT_S)
    assert isinstance(granted, m.Granted)
    client.wait(client.commit(granted.lease, range(len(numbers)), [bytes(16)] * len(numbers)), LIMIT_S)
    client.release(granted.lease)
    return client


@pytest.mark.process
@pytest.mark.parametrize("disk", [True, False])
def test_it_is_ready_at_once_and_says_what_it_drops(tmp_path: Path, disk: bool) -> None:
    with manager(str(tmp_path / "notify")) as heard:
        began_s = time.monotonic()
        options = [f"--disk-path={tmp_path / 'disk'}", "--disk-size=1 MiB"] if disk else []
        process, path = served(tmp_path, *options)
        said = {heard.recv(4096).decode() for _ in range(2)}
        took_s = time.monotonic() - began_s
        assert "READY=1" in said
        assert any(one.startswith("STATUS=the pool is populated") for one in said)
        client = keep(path, 1, 2)
        process.send_signal(signal.SIGTERM)
        assert heard.recv(4096) == b"STOPPING=1"
        assert process.stderr is not None
        lines = process.stderr.read()
        assert process.wait(LIMIT_S) == 0
        process.stderr.close()
        client.close()
    assert "the pool is populated: 1 MiB in " in lines
    if not disk:
        assert "ended: the pool had 2 chunks, 2 of them were written nowhere and are dropped" in lines
    assert not path.exists()
    assert took_s < LIMIT_S


@pytest.mark.process
def test_what_its_disk_refused_is_in_its_last_word(tmp_path: Path) -> None:
    """A disk without room for one record."""
    process, path = served(tmp_path, f"--disk-path={tmp_path / 'disk'}", "--disk-size=4 KiB")
    assert process.stderr is not None
    while "disk tier of" not in process.stderr.readline():
        assert process.poll() is None
    client = keep(path, 1, 2)
    process.send_signal(signal.SIGTERM)
    lines = process.stderr.read()
    assert process.wait(LIMIT_S) == 0
    process.stderr.close()
    client.close()
    last = lines.splitlines()[-1]
    assert "WARNING" in last
    assert last.endswith("ended: the pool had 2 chunks, 2 of them were written nowhere and are dropped")


@pytest.mark.process
def test_two_that_do_not_share_are_told_apart(tmp_path: Path) -> None:
    process, path = served(tmp_path, "--disk-path=")
    assert process.stderr is not None
    assert "pool of" in process.stderr.readline()
    clients = [keep(path, 1, who=(b"a", "kv_dtype  'bfloat16'")), keep(path, 1, 2, who=(b"b", "kv_dtype  'fp8'"))]
    shown = CliRunner().invoke(app, ["stats", f"--socket={path}"], env={"COLUMNS": "200"}).output
    process.terminate()
    lines = process.stderr.read()
    assert process.wait(LIMIT_S) == 0
    process.stderr.close()
    for client in clients:
        client.close()
    apart = "kv_dtype: 'fp8' here, 'bfloat16' there"
    assert f"shares nothing with the one before: {apart}" in lines
    first, second = (next(line for line in shown.splitlines() if 4 * one in line) for one in ("61", "62"))
    assert [cell.strip() for cell in first.split("│")[2:5]] == ["test", "1", ""]
    assert [cell.strip() for cell in second.split("│")[2:5]] == ["test", "2", apart]


def test_a_wrong_option_is_named_as_it_was_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", f"--socket={tmp_path / 's'}", "--disk-path=/x", "--disk-size=banana"])
    assert result.exit_code == 2
    assert result.stderr.startswith("kvkeep: --disk-size is 'banana'; right is ")


def test_every_setting_of_a_store_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Config] = []
    monkeypatch.setattr(serve_module, "run", lambda config, fd, path: ran.append(config))
    monkeypatch.setattr(serve_module, "write_log", lambda level: None)
    (tmp_path / "k.toml").write_text('policy = "mru"\nlog_level = "error"\n')
    said = [
        "--policy=LFU",
        "--pool-size=3 MiB",
        "--max-pinned-share=1",
        "--lease-time-s=5",
        f"--config={tmp_path}/k.toml",
    ]
    disk = ["path=/a:/b", "size=1 GiB", "min-free=0", "policy=lfu", "durability=every", "threads=9"]
    result = CliRunner().invoke(app, ["serve", "--socket=/s", *said, *(f"--disk-{text}" for text in disk)])
    assert result.exit_code == 0, result.output
    tier = Disk(path=("/a", "/b"), size=1 << 30, min_free=0, policy="lfu", durability=Durability.EVERY, threads=9)
    assert ran == [
        Config(
            pool_size=3 << 20, policy="lfu", max_pinned_share=1.0, lease_time_s=5.0, log_level="error", tiers=(tier,)
        )
    ]
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    assert all(f"--{name.replace('_', '-')} " in shown for name in STORE_SETTINGS)


def test_nobody_is_told_where_there_is_no_manager(tmp_path: Path) -> None:
    notify("READY=1", {})
    notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})


def test_an_abstract_address_is_understood() -> None:
    name = f"kvkeep-test-{os.getpid()}"
    with manager("\0" + name) as heard:
        notify("READY=1", {"NOTIFY_SOCKET": "@" + name})
        assert heard.recv(100) == b"READY=1"


@pytest.mark.parametrize("folder", ["/proc/nope/run", "/" + "x" * 120])
def test_a_socket_that_cannot_be_is_one_line_with_a_cure(folder: str) -> None:
    result = CliRunner().invoke(app, ["serve", f"--socket={folder}/store", "--pool-size=1 MiB", "--disk-path="])
    assert result.exit_code == 2
    assert "XDG_RUNTIME_DIR" in result.stderr
    assert result.stderr.startswith("kvkeep: ")


def test_a_file_is_not_deleted(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "notes").write_text("mine")
    result = CliRunner().invoke(app, ["serve", f"--socket={tmp_path / 'notes'}", "--pool-size=1 MiB", "--disk-path="])
    assert result.exit_code == 2
    assert (tmp_path / "notes").read_text() == "mine"


def test_names_and_problems_of_others_are_shown_and_never_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "[/x] [bold]m \x1b[31m\nforged"
    shown = "[/x] [bold]m \\x1b[31m\\nforged"
    known = [m.Known(b"a" * 16, evil, f"a  {evil}", 1), m.Known(b"b" * 16, evil, "a  b", 2)]
    answer = m.Stats(
        call=1,
        rows=[Figure("pool_nbytes", "", 1 << 30), Figure("chunks", "", 12345), Figure(evil, "disk", 7)],
        problem=evil,
        known=known,
        out={"disk": f"busy {evil}"},
    )
    monkeypatch.setattr(stats_module, "ask_stats", lambda path, check: answer)
    result = CliRunner().invoke(app, ["stats", "--socket=/[/x]"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert result.output.count(shown) >= 5
    assert f"none: busy {shown.partition(chr(92) + 'n')[0]}" in result.output
    assert "\x1b" not in result.output
    assert "1.00 GiB" in result.output
    assert "12,345" in result.output
    assert "store at /[/x]" in result.output


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, check: bool) -> m.Stats:
        raise PermissionError(13, "Permission denied", "/a\nb")

    monkeypatch.setattr(stats_module, "ask_stats", refuse)
    result = CliRunner().invoke(app, ["stats", "--socket=/s"])
    assert (result.exit_code, result.stderr) == (2, "kvkeep: [Errno 13] Permission denied: '/a\\nb'\n")
