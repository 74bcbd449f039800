from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.transfer.choice import (
    NEVER,
    WORTH,
    Choice,
    Sample,
    decide,
    read_choice,
    unmeasured,
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
    choice = decide("H100", samples(True, engine) + samples(False, [1, 1, 1]))
    assert choice.to_pool_nbytes == threshold
    assert choice.from_pool_nbytes == NEVER
    assert choice.way(True, threshold) == "engine"
    assert choice.way(True, threshold - 1) == "kernel"
    assert choice.way(False, 1 << 30) == "kernel"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 99), st.floats(1, 9), st.floats(1, 9)), min_size=1))
def test_no_measured_size_is_given_to_an_engine_that_lost_there(rows: list[tuple[bool, int, float, float]]):
    unique = {row[:2]: Sample(*row) for row in rows}.values()
    choice = decide("d", list(unique))
    for sample in unique:
        if choice.way(sample.to_pool, sample.page_nbytes) == "engine":
            assert sample.engine_rate >= WORTH * sample.kernel_rate


def test_a_choice_is_kept_and_is_one_devices(tmp_path: Path):
    choice = decide("H100", samples(True, [1, 49, 55]) + samples(False, [1, 1, 55]))
    file = tmp_path / "new" / "transfer.json"
    assert read_choice(file, "H100") is None
    assert write_choice(file, choice)
    assert read_choice(file, "H100") == choice
    assert read_choice(file, "H200") is None
    assert [one.name for one in file.parent.iterdir()] == ["transfer.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"device":"H100","to_pool_nbytes":"x"}', b"\xff"])
def test_a_file_that_is_something_else_is_no_choice(tmp_path: Path, content: bytes):
    (tmp_path / "f").write_bytes(content)
    assert read_choice(tmp_path / "f", "H100") is None


def test_a_choice_of_another_version_is_none(tmp_path: Path):
    write_choice(tmp_path / "f", Choice("H100", 1, 1, version=0))
    assert read_choice(tmp_path / "f", "H100") is None


def test_a_place_that_cannot_be_written_is_an_answer(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"")
    assert not write_choice(tmp_path / "f" / "g", unmeasured("H100"))


def test_people_can_read_it():
    assert str(decide("H100", samples(True, [1, 49, 55]) + samples(False, [1, 1, 1]))) == (
        "H100: copy engine for pages from 64 KiB on when storing, no size when loading, else the kernel, up to 55 GB/s"
    )
    assert str(unmeasured("H100")).endswith("(not measured)")
