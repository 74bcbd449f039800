"""Where what was found out is kept for a user, and what becomes of one who has no home directory."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from kvkeep.config import Config
from kvkeep.doors.fingerprint import WEIGHT_SUFFIXES, default_memory, fingerprint
from kvkeep.engine.rank.open import wish_of
from kvkeep.home import cache_file
from kvkeep.transfer.device.choice import Sample, choose, default_file, kept_choice


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the password file and without HOME, as `docker run --user 12345` makes one."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/user"}, "/xdg"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/user"}, "/home/user/.cache"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/user"}, "/home/user/.cache"),
        ({"HOME": "/home/user"}, "/home/user/.cache"),
    ],
)
def test_it_is_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_file("a.json") == Path(folder, "kvkeep", "a.json")


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_keeps_nothing_and_gets_everything_else(tmp_path: Path) -> None:
    assert cache_file("a.json") is None
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    assert fingerprint(tmp_path, WEIGHT_SUFFIXES, default_memory()) == fingerprint(tmp_path, WEIGHT_SUFFIXES, None)
    wish = wish_of(Config())
    assert (wish.kept, default_file()) == (None, None)
    assert kept_choice(wish.kept) is None
    samples = [Sample(to_pool, 4096, 2.0, 1.0) for to_pool in (False, True)]
    assert choose("H100", wish, lambda: samples, "").samples == tuple(samples)
