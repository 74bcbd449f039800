"""Where a store listens: nothing but a dead store's socket is removed, and every refusal says what to do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.store.server.listening import MAX_PATH_NBYTES, listen, unlink_own


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(0o700)
    return folder / "store"


def a_file(path: Path) -> None:
    path.write_text("notes")


def a_link_to_a_file(path: Path) -> None:
    path.with_name("notes").write_text("notes")
    path.symlink_to("notes")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_file, a_link_to_a_file, a_dangling_link, os.mkfifo, Path.mkdir])
def test_what_is_no_socket_stays_as_it_is(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    before = path.lstat(), sorted(path.parent.iterdir())
    with pytest.raises(ConfigError, match="is no socket and stays as it is"):
        listen(path)
    assert (path.lstat().st_ino, sorted(path.parent.iterdir())) == (before[0].st_ino, before[1])


def test_a_store_that_takes_nobody_in_is_not_replaced(path: Path) -> None:
    """One that is stopped: its queue of connections is full."""
    busy = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    busy.bind(str(path))
    busy.listen(0)
    waiting = []
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        waiting.append(client)
        if client.connect_ex(str(path)):
            break
    with pytest.raises(ConfigError, match="a store answers at"):
        listen(path)
    assert path.is_socket()
    for sock in (busy, *waiting):
        sock.close()


def test_a_path_that_is_too_long_is_named_with_its_length(tmp_path: Path) -> None:
    path = Path("/" + "x" * MAX_PATH_NBYTES)
    with pytest.raises(ConfigError, match=rf"at most 107 bytes; {path} has 108: .*XDG_RUNTIME_DIR"):
        listen(path)
    assert not path.exists()


@pytest.mark.parametrize("folder", ["/proc/kvkeep/run", "/dev/null/run", "/proc/self"])
def test_a_folder_that_cannot_be_is_named_with_what_to_do(folder: str) -> None:
    with pytest.raises(ConfigError, match=rf"{folder}.*XDG_RUNTIME_DIR.*RuntimeDirectory=kvkeep") as caught:
        listen(Path(folder) / "store")
    assert "chmod" not in str(caught.value)


def test_an_end_removes_its_own_socket_and_nobody_elses(path: Path) -> None:
    with listen(path):
        own = path.lstat()
        path.unlink()
        unlink_own(path, own)
        with listen(path):
            unlink_own(path, own)
            assert path.is_socket()
            unlink_own(path, path.lstat())
            assert not path.exists()
