from __future__ import annotations

import io
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import kvkeep
from kvkeep.cli import doctor as doctor_module
from kvkeep.cli.doctor import (
    Check,
    as_table,
    check_disk,
    check_memory,
    check_pages,
    check_python,
    check_sealing,
    check_speed,
    check_store,
    check_transfer,
    check_vllm,
    installed,
)
from kvkeep.cli.main import app
from kvkeep.config import Config, Disk
from kvkeep.errors import ConfigError
from kvkeep.memory.limits import Limit, MemoryLimits
from kvkeep.memory.region import Region
from kvkeep.testing.doubles.store_thread import shared_store
from kvkeep.transfer.device.choice import DevicePath, Sample, decide, write_choice

GIB = 1 << 30


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "_PROBE_NBYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing was measured"))


def invoke(*arguments: str, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, [*arguments], env=env)


def text_of(check: Check) -> str:
    out = io.StringIO()
    Console(width=200, file=out).print(as_table([check]))
    return out.getvalue()


def test_a_right_machine_is_ok() -> None:
    result = invoke("doctor", "--pool-size", "1 MiB")
    assert result.exit_code == 0, result.output
    for row in ("Python", "vLLM", "configuration", "a pool of 1 MiB", "memfd, sealed", "GB/s"):
        assert row in result.output
    assert result.output.count(" ok ") == 7
    assert "problem" not in result.output


def test_a_pool_that_does_not_fit_is_a_problem_with_a_cure() -> None:
    result = invoke("doctor", "--pool-size", "900 TiB")
    assert result.exit_code == 1
    assert result.output.count("problem") == 1
    assert "does not fit" in result.output


def test_a_wrong_file_is_a_problem_and_the_rest_is_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("k.toml").write_text("[pool]\nsize = 1\n")
    result = invoke("doctor", "--config", "k.toml")
    assert result.exit_code == 1
    assert "k.toml: [pool] is a table" in result.output
    assert "memfd, sealed" in result.output


def test_a_right_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text('pool_size = "3 MiB"\n')
    result = invoke("doctor", "--config", str(file))
    assert result.exit_code == 0, result.output
    assert "a pool of 3 MiB" in result.output
    assert "a pool of 2 MiB" in invoke("doctor", "--config", str(file), "--pool-size", "2 MiB").output


def test_the_environment_is_checked_too() -> None:
    result = invoke("doctor", env={"KVKEEP_CHUNK_TOKEN": "1"})
    assert result.exit_code == 1
    assert "KVKEEP_CHUNK_TOKENS?" in result.output


def test_a_failure_is_one_line_without_a_traceback() -> None:
    result = invoke("doctor", "--pool-size", "lots")
    assert result.exit_code == 2
    assert result.stderr.startswith("kvkeep: --pool-size is 'lots'; right is ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_automatic_size_may_be_asked_for() -> None:
    assert invoke("doctor", "--pool-size", "auto").exit_code == 0


def test_version() -> None:
    result = invoke("version")
    assert (result.exit_code, result.stdout) == (0, f"kvkeep {kvkeep.__version__}\n")


@pytest.mark.parametrize(("version", "right"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_python_versions(version: tuple[int, int], right: bool) -> None:
    check = check_python(version)
    assert bool(check.cure) is not right
    assert f"{version[0]}.{version[1]}" in check.found


@pytest.mark.parametrize(("policy", "said"), [("recompute", "computed again"), ("keep", "fails the request")])
def test_it_says_what_becomes_of_a_load_that_fails(policy: str, said: str) -> None:
    result = invoke("doctor", "--pool-size", "1 MiB", env={"KVKEEP_LOAD_FAILURE_POLICY": policy})
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize(("policy", "said"), [("recompute", "can wait by layer"), ("keep", "would fail its request")])
def test_it_says_whether_early_loads_can_be(policy: str, said: str) -> None:
    env = {"KVKEEP_EARLY_LOADS": "true", "KVKEEP_TRANSFER_MODE": "layerwise", "KVKEEP_LOAD_FAILURE_POLICY": policy}
    assert said in " ".join(invoke("doctor", "--pool-size", "1 MiB", env=env).output.replace("│", " ").split())
    assert "early_loads" not in invoke("doctor", "--pool-size", "1 MiB").output


def test_memory_names_the_limit() -> None:
    limits = MemoryLimits((Limit("/sys/fs/cgroup/memory.max", 8 * GIB, 6 * GIB),))
    assert check_memory(Config(), limits).cure == ""
    assert "/sys/fs/cgroup/memory.max" in check_memory(Config(pool_size="3 GiB"), limits).cure


def test_a_kernel_without_memfd_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_nbytes: int) -> Region:
        raise ConfigError("not here")

    monkeypatch.setattr(Region, "create", refuse)
    assert "not here" in check_sealing().cure
    assert "not here" in check_speed(float).cure


def test_a_seal_that_does_not_hold_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkeep.memory.region.fcntl.fcntl", lambda *_: 0)
    assert check_sealing().cure


def test_speeds_come_from_the_clock() -> None:
    ticks = count(0.0, 1e-3)
    assert check_speed(lambda: next(ticks)).found == "populate 1.0 GB/s, copy 1.0 GB/s"


def test_a_table_takes_brackets_literally() -> None:
    assert "[red]x[/nope]" in text_of(Check("a", "b", "[red]x[/nope]"))


@pytest.mark.process
def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, kvkeep.cli.main; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_disk_tier_that_fits_is_right(tmp_path: Path) -> None:
    found = check_disk(tmp_path / "new" / "folder", Disk(path=str(tmp_path), size="1 MiB"))
    assert (found.cure, "1 MiB wanted" in found.found) == ("", True)


def test_a_disk_tier_that_cannot_fit_says_what_to_do(tmp_path: Path) -> None:
    assert "disk_size" in check_disk(tmp_path, Disk(path=str(tmp_path), size="900 TiB")).cure


def test_a_disk_tier_in_place_of_a_file_names_the_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert str(file) in check_disk(file / "folder", Disk(path=str(file))).cure


def measured() -> DevicePath:
    return decide("H100", [Sample(True, 4096, 21e9, 3e9), Sample(False, 65536, 50e9, 52e9)], 16)


def test_what_was_measured_of_a_device_is_shown_by_size_and_direction(tmp_path: Path) -> None:
    file = tmp_path / "transfer.json"
    assert write_choice(file, measured())
    (check,) = check_transfer(Config(), file, has_device=False)
    assert not check.cure
    text = text_of(check)
    assert "H100, 16 programs" in text
    assert "store    4 KiB: kernel 21.0, copy engine 3.0 GB/s: kernel" in text
    assert "load    64 KiB: kernel 50.0, copy engine 52.0 GB/s: copy engine" in text
    (other,) = check_transfer(Config(transfer_programs=8), file, has_device=True)
    assert "measured again for transfer_programs = 8" in other.found


def test_a_machine_without_a_device_has_no_row_and_a_new_one_says_what_comes(tmp_path: Path) -> None:
    file = tmp_path / "transfer.json"
    assert check_transfer(Config(), file, has_device=False) == []
    (new,) = check_transfer(Config(), file, has_device=True)
    assert new.found == "not measured yet: an engine does it when it starts"
    (fixed,) = check_transfer(Config(transfer="copy"), file, has_device=True)
    assert fixed.found == "the copy engine, as set"
    (fixed,) = check_transfer(Config(transfer="kernel"), file, has_device=True)
    assert fixed.found == "the kernel, as set"


def test_the_command_shows_the_file_of_this_user(tmp_path: Path) -> None:
    assert write_choice(tmp_path / "kvkeep" / "transfer.json", measured())
    result = invoke("doctor", "--pool-size", "1 MiB", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert result.exit_code == 0, result.output
    assert "GPU copies" in result.output


@pytest.mark.parametrize(
    ("version", "cure"),
    [(None, ""), ("0.32.0", ""), ("0.32.1+cpu", ""), ("0.31.2", "vllm==0.32.*"), ("1.32.0", "vllm")],
)
def test_another_vllm_is_a_problem(version: str | None, cure: str) -> None:
    found = check_vllm(version)
    assert bool(found.cure) == bool(cure)
    assert cure in found.cure
    assert (version or "not installed") in found.found


def test_what_is_installed_is_told_without_importing_it() -> None:
    assert installed("pytest") == pytest.__version__
    assert installed("no_such_module") is None


def test_a_store_that_is_configured_must_answer(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = str(tmp_path / "store")
    assert "kvkeep serve" in check_store(path).cure
    with shared_store(Path(path), Config(pool_size=1 << 20)):
        found = check_store(path)
    assert (found.cure, found.found) == ("", "0 chunks, 0 MiB of 1 MiB")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("always within_size advise [never] deny force\n", "reading from disk is slower; `echo advise > "),
        ("always within_size advise never [deny] force\n", "deny: the pool is in pages of 4 KiB"),
        ("always within_size [advise] never deny force\n", "lent to the pool (advise)"),
        (None, "none: this kernel has none"),
    ],
)
def test_small_pages_are_a_hint_with_its_cure_and_no_problem(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "shmem_enabled"
    if text is not None:
        file.write_text(text)
    check = check_pages(file)
    assert says in check.found
    assert check.cure == ""


def test_the_pages_are_looked_at_where_there_is_a_disk(tmp_path: Path) -> None:
    disk = {"KVKEEP_DISK_PATH": str(tmp_path), "KVKEEP_DISK_SIZE": "1 MiB", "KVKEEP_DISK_MIN_FREE": "1 KiB"}
    assert "huge pages" in invoke("doctor", "--pool-size", "1 MiB", env=disk).output
    assert "huge pages" not in invoke("doctor", "--pool-size", "1 MiB").output


def test_a_wrong_configuration_says_what_the_other_rows_are_about() -> None:
    _, check = doctor_module.check_config({"config_file": "/nonexistent.toml"}, Config())
    assert check.found.startswith("wrong: /nonexistent.toml: the configuration file cannot be read")
    assert check.cure == "correct it; the other rows are about the defaults"


def test_a_disk_that_cannot_be_looked_at_is_a_row_with_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    check = check_disk(tmp_path, Disk(path=str(tmp_path)))
    assert "Permission denied" in check.found
    assert "let this user into it" in check.cure
