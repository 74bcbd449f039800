from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.transfer.device.choice import (
    NEVER,
    WORTH,
    DevicePath,
    Sample,
    Way,
    Wish,
    always,
    choose,
    decide,
    default_file,
    kept_choice,
    read_choice,
    write_choice,
)

SIZES = [4 << 10, 64 << 10, 1 << 20]


def samples(to_pool: bool, engine: list[float]) -> list[Sample]:
    return [Sample(to_pool, size, 50e9, rate * 1e9) for size, rate in zip(SIZES, engine, strict=True)]


@pytest.mark.parametrize(
    ("engine", "threshold"),
    [
        ([1, 20, 55], 1 << 20),
        ([1, 49, 55], 64 << 10),
        ([49, 49, 49], 4 << 10),
        ([1, 2, 3], NEVER),
        ([60, 3, 60], 1 << 20),
        ([60, 60, 3], NEVER),
    ],
)
def test_the_engine_is_taken_from_where_on_it_always_pays(engine: list[float], threshold: int):
    choice = decide("H100", samples(True, engine) + samples(False, [1, 1, 1]), 16)
    assert choice.to_pool_nbytes == threshold
    assert choice.from_pool_nbytes == NEVER
    assert choice.way(True, threshold) == "copy"
    assert choice.way(True, threshold - 1) == "kernel"
    assert choice.way(False, 1 << 30) == "kernel"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 99), st.floats(1, 9), st.floats(1, 9)), min_size=1))
def test_no_measured_size_is_given_to_an_engine_that_lost_there(rows: list[tuple[bool, int, float, float]]):
    unique = {row[:2]: Sample(*row) for row in rows}.values()
    choice = decide("d", list(unique), 16)
    for sample in unique:
        if choice.way(sample.to_pool, sample.page_nbytes) == "copy":
            assert sample.copy_rate >= WORTH * sample.kernel_rate


def test_a_choice_is_kept_and_is_one_devices_and_one_number_of_programs(tmp_path: Path):
    choice = decide("H100", samples(True, [1, 49, 55]) + samples(False, [1, 1, 55]), 16)
    file = tmp_path / "new" / "transfer.json"
    assert read_choice(file, "H100", 16) is None
    assert kept_choice(file) is None
    assert write_choice(file, choice)
    assert read_choice(file, "H100", 16) == choice == kept_choice(file)
    assert read_choice(file, "H200", 16) is None
    assert read_choice(file, "H100", 8) is None
    assert [one.name for one in file.parent.iterdir()] == ["transfer.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"device":"H100","to_pool_nbytes":"x"}', b"\xff"])
def test_a_file_that_is_something_else_is_no_choice(tmp_path: Path, content: bytes):
    (tmp_path / "f").write_bytes(content)
    assert kept_choice(tmp_path / "f") is None


def test_a_choice_of_another_version_is_none(tmp_path: Path):
    assert write_choice(tmp_path / "f", DevicePath("H100", 1, 1, version=0))
    assert kept_choice(tmp_path / "f") is None


def test_a_place_that_cannot_be_written_is_an_answer(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"")
    assert not write_choice(tmp_path / "f" / "g", always("H100", "kernel"))


@pytest.mark.parametrize("way", ["kernel", "copy"])
def test_what_is_set_holds_for_every_page(way: Way):
    choice = always("H100", way)
    assert {choice.way(to_pool, size) for to_pool in (True, False) for size in (1, 1 << 40)} == {way}
    assert str(choice) == f"H100: {'the kernel' if way == 'kernel' else 'the copy engine'} for all pages, as set"
    assert choice.lines == []


def test_the_file_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_file() == tmp_path / "kvkeep" / "transfer.json"


def test_people_can_read_it():
    choice = decide("H100", samples(False, [1, 1, 1]) + samples(True, [1, 49, 55]), 16)
    assert str(choice) == (
        "H100: copy engine for pages from 64 KiB on when storing, no size when loading, else the kernel, up to 55 GB/s"
    )
    assert choice.lines == [
        "store    4 KiB: kernel 50.0, copy engine 1.0 GB/s: kernel",
        "store   64 KiB: kernel 50.0, copy engine 49.0 GB/s: copy engine",
        "store 1024 KiB: kernel 50.0, copy engine 55.0 GB/s: copy engine",
        "load     4 KiB: kernel 50.0, copy engine 1.0 GB/s: kernel",
        "load    64 KiB: kernel 50.0, copy engine 1.0 GB/s: kernel",
        "load  1024 KiB: kernel 50.0, copy engine 1.0 GB/s: kernel",
    ]


def never() -> list[Sample]:
    raise AssertionError("measured")


def test_a_device_is_measured_once_and_again_for_another_number_of_programs(tmp_path: Path):
    wish = Wish(tmp_path / "f")
    first = choose("H100", wish, lambda: samples(True, [1, 49, 55]), "")
    assert first.to_pool_nbytes == 64 << 10
    assert choose("H100", wish, never, "") == first
    assert choose("H100", wish._replace(programs=8), lambda: samples(True, [1, 1, 1]), "").to_pool_nbytes == NEVER


@pytest.mark.parametrize(
    ("way", "without", "wanted"),
    [
        ("kernel", "", "kernel"),
        ("copy", "", "copy"),
        ("auto", "no Triton", "copy"),
        ("kernel", "no Triton", "copy"),
        ("copy", "no Triton", "copy"),
    ],
)
def test_what_is_set_or_the_only_way_is_taken_without_measuring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: Literal["auto", "kernel", "copy"], without: str, wanted: Way
):
    choice = choose("H100", Wish(tmp_path / "f", way), never, without)
    assert choice == always("H100", wanted)
    assert not list(tmp_path.iterdir())
    assert ("no Triton" in caplog.text) == (bool(without) and way != "copy")


def test_a_choice_that_cannot_be_kept_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "f").write_bytes(b"")
    with caplog.at_level("INFO", "kvkeep"):
        choice = choose("H100", Wish(tmp_path / "f" / "g"), lambda: samples(True, [55, 55, 55]), "")
    assert choice.to_pool_nbytes == 4 << 10
    assert "measured again at the next start" in caplog.text
