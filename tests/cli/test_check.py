from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvkeep.cli.main import app
from kvkeep.config import Disk
from kvkeep.store.identities import FILE, write_identities
from kvkeep.store.namespaces import Named
from kvkeep.testing.doubles.faulty_files import flip_bit
from kvkeep.testing.suites.tiers import holds, key, write_of
from kvkeep.tiers.disk.disk import open_disk

WRITES = [write_of(key(number)) for number in range(6)]


def path_of(root: Path, number: int) -> str:
    one = WRITES[number].key
    return f"{root}/{one[:16].hex()}/{one[16:17].hex()}/{one[16:].hex()}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    asyncio.run(use(tmp_path / "disk", True))
    return tmp_path / "disk"


async def use(root: Path, stores: bool) -> list[bool]:
    tier = await open_disk(Disk(path=(str(root),), size=1 << 20, min_free=0))
    await tier.wait_for_scan()
    if stores:
        await tier.store(WRITES)
    there = [await holds(tier, one) for one in WRITES]
    await tier.aclose()
    return there


def spoil(root: Path) -> None:
    os.truncate(path_of(root, 0), 5000)
    os.truncate(path_of(root, 1), 100)
    flip_bit(path_of(root, 2), 8 * 5000)
    flip_bit(path_of(root, 3), 8 * 50)
    shutil.copy(path_of(root, 5), path_of(root, 4))


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments])


def test_good_records_are_good(root: Path) -> None:
    result = invoke(str(root))
    assert (result.exit_code, result.output) == (0, "6 records: 6 good\n")


def test_whose_records_they_are_is_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    mine, others = WRITES[0].key[:16], b"o" * 16
    write_identities(root, {others: Named("vllm m", "kv_dtype  'fp8'"), mine: Named("vllm m", "kv_dtype  'bfloat16'")})
    (row,) = (line for line in invoke(str(root)).output.splitlines() if mine.hex()[:8] in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["vllm m", "6", ""]
    os.renames(root / mine.hex(), root / others.hex())
    for number in range(3):
        Path(path_of(root, number)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_of(root, number).replace(mine.hex(), others.hex()), path_of(root, number))
    rows = [line for line in invoke(str(root)).output.splitlines() if "vllm m" in line]
    assert [row.split("│")[3].strip() for row in rows] == ["6", "3"]
    assert "kv_dtype: 'bfloat16' here, 'fp8' there" in rows[1]


def test_every_kind_of_bad_record_is_named(root: Path) -> None:
    spoil(root)
    result = invoke(str(root))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "6 records: 1 good, 2 torn, 1 foreign, 2 corrupt"
    for number, kind in enumerate(("torn", "torn", "corrupt", "corrupt", "foreign")):
        assert f"{kind}: {path_of(root, number)}: " in result.output
    assert os.path.exists(path_of(root, 0)), "a check alone removes nothing"


def test_a_repair_leaves_what_is_good(root: Path) -> None:
    spoil(root)
    result = invoke(str(root), "--repair")
    assert result.exit_code == 0
    assert "; 5 removed" in result.output
    assert invoke(str(root)).output == "1 records: 1 good\n"
    assert asyncio.run(use(root, False)) == [False] * 5 + [True]


def test_records_without_their_epochs_are_old(root: Path) -> None:
    (root / "epochs").unlink()
    result = invoke(str(root))
    assert result.exit_code == 1
    assert "6 records: 0 good, 6 old" in result.output


def test_a_directory_in_use_is_checked_but_not_repaired(root: Path) -> None:
    async def test() -> None:
        tier = await open_disk(Disk(path=(str(root),), size=1 << 20))
        assert invoke(str(root)).exit_code == 0
        result = invoke(str(root), "--repair")
        assert result.exit_code == 2
        assert "belongs to another process" in result.output
        await tier.aclose()

    asyncio.run(test())


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    assert invoke(str(tmp_path / "none")).exit_code == 2
    assert not (tmp_path / "none").exists()


EVIL = "[/x] [bold]m[/bold] \x1b[31mred\nforged\u202e"
SHOWN = "[/x] [bold]m[/bold] \\x1b[31mred\\nforged\\u202e"


def test_names_are_shown_and_never_obeyed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    mine, others = WRITES[0].key[:16], b"o" * 16
    write_identities(root, {others: Named(EVIL, f"kv_dtype  {EVIL}"), mine: Named(EVIL, "kv_dtype  'bfloat16'")})
    os.renames(root / mine.hex() / WRITES[0].key[16:17].hex(), root / others.hex() / WRITES[0].key[16:17].hex())
    result = invoke(str(root))
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit), "a record under a foreign name"
    assert result.output.count(SHOWN) >= 2
    assert "\x1b" not in result.output
    assert "\nforged" not in result.output


def deep(file: Path) -> None:
    file.write_text("[" * 200_000)


def linked(file: Path) -> None:
    file.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [deep, linked, os.mkfifo, Path.mkdir, lambda file: file.write_text("{}")])
def test_a_file_of_names_that_is_none_is_named_and_the_records_are_checked(root: Path, make) -> None:
    (root / FILE).unlink(missing_ok=True)
    make(root / FILE)
    result = invoke(str(root))
    assert result.exit_code == 0
    assert result.output.startswith("6 records: 6 good\n")
    assert f"{root / FILE} cannot be used, so no namespace has a name here: " in result.output.replace(
        "\n", " "
    ).replace("  ", " ")


def test_a_foreign_directory_is_no_good_one_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    for options in ([], ["--repair"]):
        result = invoke(str(tmp_path), *options)
        assert result.exit_code == 2
        assert "is no directory of kvkeep's disk tier" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
