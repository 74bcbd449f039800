from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvkeep.bench import engine_child as bench_engine
from kvkeep.bench.daemon import idle_rows, lookup_rows
from kvkeep.bench.disk import DiskBenches, DiskSize, cached_rows, disk_rows, transfer_rows
from kvkeep.bench.engine_child import engine_rows
from kvkeep.bench.index import MILLION, index_rows, process_nbytes
from kvkeep.bench.pieces import LINE_NBYTES, aligned, piece_rows
from kvkeep.bench.rows import Case, write
from kvkeep.cli.main import app

KEYS = ["keys-array", "keys-list", "keys-one-more-chunk"]
ALLOC = ["freelist", "freelist-holes", "freelist-fail"]


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_groups_that_are_named_run_and_their_rows_are_written(tmp_path: Path):
    file = tmp_path / "rows.json"
    result = invoke("alloc", "keys", "--runs", "2", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [row["case"] for row in rows] == [*ALLOC, *KEYS]
    for row in rows:
        assert row["case"] in result.output
        assert row["runs"] == 2
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert math.isclose(row["ratio"], row["median"] / row["yardstick_median"])
        assert row["machine"]
        assert row["command"]


def test_rows_of_other_cases_stay_where_they_are_to_be_kept(tmp_path: Path):
    file = tmp_path / "rows.json"

    def row(case: str, value: float):
        return Case(case, "us", "nothing").row([value], [1.0])

    write([row("a", 1.0), row("b", 2.0)], file)
    write([row("b", 3.0), row("c", 4.0)], file, keeps=True)
    assert [(one["case"], one["median"]) for one in json.loads(file.read_text())] == [
        ("a", 1.0),
        ("b", 3.0),
        ("c", 4.0),
    ]
    write([row("d", 5.0)], file)
    assert [one["case"] for one in json.loads(file.read_text())] == ["d"]


def test_an_unknown_group_is_answered_with_the_known_ones():
    result = invoke("disc")
    assert result.exit_code == 2
    assert "'keys'" in result.output


def test_without_torch_the_engine_group_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_engine, "find_spec", lambda name: None)
    result = invoke("engine")
    assert result.exit_code == 2
    assert "pip install 'kvkeep[torch]'" in result.output


@pytest.mark.parametrize("fio", [False, True])
def test_the_disk_cases_of_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fio: bool):
    if fio and shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    monkeypatch.setattr("kvkeep.bench.disk.has_fio", lambda: fio)
    size = DiskSize("64k", 64 << 10, 6, "")
    rows = [*transfer_rows(DiskBenches(tmp_path), size, 1), *cached_rows(DiskBenches(tmp_path / "cached"), size, 1)]
    beside = ("", "-vs-fio") if fio else ("",)
    names = [f"disk-{verb}-64k{what}" for verb in ("store", "load") for what in beside]
    assert [row.case for row in rows] == [*names, "disk-load-64k-cached"]
    assert all(0 < row.min <= row.max and row.yardstick_min > 0 for row in rows)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cached"], "what was written is removed"


@pytest.mark.slow
def test_the_disk_cases_that_have_a_goal():
    goals = {row.case: row.goal for row in disk_rows(1) if row.goal}
    assert goals == {
        **{f"disk-{verb}-{size}": ">= 0.95" for verb in ("store", "load") for size in ("32m", "2m")},
        **{f"disk-{verb}-256k": ">= 0.70" for verb in ("store", "load")},
        "disk-verify-share": "<= 0.10",
        "disk-metadata": "<= 60 us",
    }


@pytest.mark.slow
def test_the_engine_cases():
    rows = engine_rows(1)
    verbs = ["store-chunk", "retrieve-chunk", "engine-lookup-chunk", "engine-lookup-new-tokens"]
    verbs_of_copies = ("store", "retrieve", "retrieve-moved", "store-no-sums")
    copies = [f"{way}-{verb}" for way in ("bulk", "layerwise") for verb in verbs_of_copies]
    assert [row.case for row in rows] == [*verbs, *copies]
    assert all(row.min > 0 for row in rows)


@pytest.mark.slow
def test_a_million_chunks_take_at_most_400_bytes_each():
    assert MILLION == 1_000_000
    assert process_nbytes("dict") < process_nbytes("index") <= 400


@pytest.mark.slow
def test_the_index_cases():
    assert [row.case for row in index_rows(1)] == ["lookup-chunk", "reserve-commit-chunk", "index-bytes-per-chunk"]


@pytest.mark.slow
def test_the_cases_of_a_store_process():
    cases = [row.case for rows in (lookup_rows, piece_rows, idle_rows) for row in rows(1)]
    lookups = ["p50", "p99", "p50-flat-out", "p50-one-client", "512-one-client"]
    moves = ["store", "retrieve", "store-shared", "retrieve-shared"]
    asked = [f"lookup-{name}" for name in lookups] + ["messages", "cpu", *moves, "idle-mib"]
    assert cases == [f"daemon-{name}" for name in asked]


def test_memory_to_compare_with_is_aligned_as_tensors_are():
    for nbytes in (1, 4096, 5 << 20):
        found = aligned(nbytes)
        assert found.size == nbytes
        assert found.ctypes.data % LINE_NBYTES == 0


@pytest.mark.parametrize(("content", "says"), [("notes", "no rows can be written"), ("{}", "something else than rows")])
def test_what_is_no_file_of_rows_stays_as_it_is(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "notes"
    file.write_text(content)
    result = CliRunner().invoke(app, ["bench", "keys", "--json", str(file)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert file.read_text() == content


def test_a_target_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["bench", "keys", "--json", str(tmp_path)]).exit_code == 2
