"""Fingerprints of weight files and of adapters: content decides, never a name or a time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvkeep.doors.fingerprint import (
    WEIGHT_SUFFIXES,
    changed_since,
    default_memory,
    fingerprint,
    process_start_ns,
    signatures,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "a.safetensors").write_bytes(b"weights a")
    (made / "b.bin").write_bytes(b"weights b")
    (made / "readme.md").write_text("no weights")
    return made


def of(folder: Path, memory: Path | None = None) -> str | None:
    return fingerprint(folder, WEIGHT_SUFFIXES, memory, lambda: time.time_ns() + 10**10)  # long after they were written


def test_it_is_the_hash_of_names_sizes_and_contents(folder: Path) -> None:
    digest = hashlib.sha256()
    for name, content in (("a.safetensors", b"weights a"), ("b.bin", b"weights b")):
        digest.update(json.dumps([name, len(content), hashlib.sha256(content).hexdigest()]).encode())
    assert of(folder) == digest.hexdigest()


def test_content_and_name_count_and_times_do_not(folder: Path) -> None:
    before = of(folder)
    os.utime(folder / "a.safetensors", (1, 1))
    (folder / "readme.md").write_text("other")
    assert of(folder) == before
    (folder / "a.safetensors").write_bytes(b"weights A")
    changed = of(folder)
    assert changed != before
    (folder / "b.bin").rename(folder / "c.bin")
    assert of(folder) not in {before, changed}


@pytest.mark.parametrize("suffixes", [(".gguf",), ()])
def test_no_weights_have_no_fingerprint(folder: Path, suffixes: tuple[str, ...]) -> None:
    assert fingerprint(folder, suffixes, None) is None
    assert fingerprint(folder / "nowhere", WEIGHT_SUFFIXES, None) is None
    assert signatures(folder / "nowhere", WEIGHT_SUFFIXES) == ()


def test_a_file_that_cannot_be_read_has_no_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "open", refused)
    assert of(folder) is None


def test_a_digest_is_remembered_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "fingerprints.json"
    first = of(folder, memory)
    known = json.loads(memory.read_text())
    assert len(known) == 2
    memory.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    remembered = of(folder, memory)
    assert remembered != first, "the memory is not used"
    (folder / "a.safetensors").write_bytes(b"weights a")
    os.utime(folder / "a.safetensors", ns=(5, 5))
    assert of(folder, memory) not in {first, remembered}, "only the file that changed is read again"
    assert len(json.loads(memory.read_text())) == 3
    memory.unlink()
    assert of(folder, memory) == first


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"a": 1}', '{"a": "short"}', '{"a": null, "b": ["x"]}', "\udcff\x00"]
)
def test_a_memory_that_is_damaged_is_ignored(folder: Path, tmp_path: Path, content: str) -> None:
    memory = tmp_path / "fingerprints.json"
    memory.write_text(content, errors="surrogateescape")
    assert of(folder, memory) == of(folder)


def test_a_remembered_value_that_is_no_digest_is_not_taken(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "fingerprints.json"
    first = of(folder, memory)
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps(dict(zip(known, ["x" * 64, 7], strict=True))))
    assert of(folder, memory) == first


def test_a_memory_that_cannot_be_written_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert of(folder, tmp_path / "file" / "fingerprints.json") == of(folder)


def test_the_memory_is_the_user_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_memory() == tmp_path / "kvkeep" / "fingerprints.json"


def test_a_blob_of_a_hub_is_named_by_its_content_and_not_read(tmp_path: Path) -> None:
    content = b"large weights"
    name = hashlib.sha256(content).hexdigest()
    blobs, snapshot, plain = tmp_path / "blobs", tmp_path / "snapshots" / "main", tmp_path / "plain"
    for one in (blobs, snapshot, plain):
        one.mkdir(parents=True)
    (blobs / name).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    (plain / "model.safetensors").write_bytes(content)
    assert of(snapshot) == of(plain)
    (blobs / name).chmod(0o600)
    (blobs / name).write_bytes(b"damage, same!")  # its name is believed: that is what is not read
    assert of(snapshot) == of(plain)


@pytest.mark.parametrize(("place", "name"), [("blobs", "a" * 40), ("blobs", "A" * 64), ("other", "a" * 64)])
def test_a_link_to_anything_else_is_read(tmp_path: Path, place: str, name: str) -> None:
    target, folder, plain = tmp_path / place / name, tmp_path / "linked", tmp_path / "plain"
    for one in (target.parent, folder, plain):
        one.mkdir()
    target.write_bytes(b"content")
    (folder / "model.bin").symlink_to(target)
    (plain / "model.bin").write_bytes(b"content")
    assert of(folder) == of(plain)


# ---- weights that change while an engine starts ----------------------------------------------------------------

START_NS = 1_000_000 * 10**9
LONG_AGO_NS = START_NS - 3600 * 10**9
LATER_NS = START_NS + 60 * 10**9


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Path, tuple[int, int]]:
    """The times (mtime, ctime) that files, links and folders are said to have; whatever is not named is old."""
    said: dict[Path, tuple[int, int]] = {}
    true = os.lstat

    def lstat(path: Path) -> SimpleNamespace:
        mtime_ns, ctime_ns = said.get(Path(path), (LONG_AGO_NS, LONG_AGO_NS))
        return SimpleNamespace(st_mode=true(path).st_mode, st_mtime_ns=mtime_ns, st_ctime_ns=ctime_ns)

    monkeypatch.setattr("kvkeep.doors.fingerprint.os.lstat", lstat)
    return said


@pytest.fixture
def linked(tmp_path: Path, folder: Path) -> Path:
    """A way to the folder over a link, in a folder of links."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to(Path("..") / "model")
    return link


def changed(folder: Path) -> Path | None:
    return changed_since(folder, WEIGHT_SUFFIXES, START_NS)


def test_what_is_older_than_the_start_has_not_changed(folder: Path, linked: Path, times: dict) -> None:
    assert (changed(folder), changed(linked)) == (None, None)


@pytest.mark.parametrize("late", [(LATER_NS, LATER_NS), (LONG_AGO_NS, LATER_NS), (LATER_NS, LONG_AGO_NS)])
def test_a_file_that_was_written_or_put_there_since_the_start_is_named(folder: Path, times: dict, late: tuple) -> None:
    times[folder / "b.bin"] = late
    assert changed(folder) == folder / "b.bin"
    times.clear()
    times[folder / "readme.md"] = late
    assert changed(folder) is None


def test_one_that_was_taken_away_is_seen_of_the_folder(folder: Path, times: dict) -> None:
    times[folder] = (LATER_NS, LATER_NS)
    assert changed(folder) == folder


def test_a_link_on_the_way_that_was_switched_is_named(tmp_path: Path, linked: Path, times: dict) -> None:
    """All that it leads to is as old as can be, and so was what it led to before."""
    times[linked] = (LATER_NS, LATER_NS)
    assert changed(linked) == linked
    outer = tmp_path / "outer"
    outer.symlink_to(linked)
    assert changed(outer) == linked


def test_a_file_that_is_a_link_is_as_new_as_the_link_and_as_what_it_leads_to(folder: Path, times: dict) -> None:
    target = folder.parent / "blob"
    target.write_bytes(b"weights c")
    (folder / "c.pt").symlink_to(target)
    assert changed(folder) is None
    for late in (folder / "c.pt", target):
        times.clear()
        times[late] = (LONG_AGO_NS, LATER_NS)
        assert changed(folder) == late


def test_a_folder_on_the_way_that_was_renamed_is_named_and_one_that_got_a_neighbour_is_not(
    tmp_path: Path, folder: Path, times: dict
) -> None:
    times[tmp_path] = (LATER_NS, LATER_NS)  # something was put beside the model, as into /tmp at any moment
    assert changed(folder) is None
    times[tmp_path] = (LONG_AGO_NS, LATER_NS)  # only its own name changed
    assert changed(folder) == tmp_path


@pytest.mark.parametrize(
    ("before_ns", "doubtful"), [(10**9, True), (2 * 10**9, True), (3 * 10**9, False), (10**9 + 1, False), (10**6, True)]
)
def test_a_time_that_was_rounded_may_have_been_later(folder: Path, times: dict, before_ns: int, doubtful: bool) -> None:
    """A file system that keeps whole seconds may round to even ones; others are behind by a tick of the kernel's."""
    times[folder / "b.bin"] = (LONG_AGO_NS, START_NS - before_ns)
    assert (changed(folder) == folder / "b.bin") == doubtful


def test_what_cannot_be_looked_at_has_changed(tmp_path: Path, folder: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert changed_since(loop, WEIGHT_SUFFIXES, START_NS) == loop
    assert changed_since(tmp_path / "nowhere", WEIGHT_SUFFIXES, START_NS) == tmp_path / "nowhere"


@pytest.mark.process
def test_times_of_this_machine_are_compared_with_when_this_process_began(folder: Path) -> None:
    start_ns = process_start_ns()
    assert changed_since(folder, WEIGHT_SUFFIXES, start_ns) is not None  # the tests wrote it just now
    assert 0 < start_ns < time.time_ns()
    assert changed_since(Path(os.__file__).parent, (".py",), start_ns) is None
    child = "import time; from kvkeep.doors.fingerprint import process_start_ns as p; print(p(), time.time_ns())"
    before_ns = time.time_ns()
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    began_ns, now_ns = map(int, done.stdout.split())
    assert before_ns - 10**9 < began_ns < now_ns < time.time_ns() + 1


def test_a_digest_of_a_file_that_may_still_change_unseen_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    """Within one tick of the file system's clock another content has the same times."""
    memory = tmp_path / "fingerprints.json"
    written_ns = max(one.ctime_ns for one in signatures(folder, WEIGHT_SUFFIXES))
    fingerprint(folder, WEIGHT_SUFFIXES, memory, lambda: written_ns + 10**6)
    assert not memory.exists()
    fingerprint(folder, WEIGHT_SUFFIXES, memory, lambda: written_ns + 3 * 10**9)
    assert len(json.loads(memory.read_text())) == 2
