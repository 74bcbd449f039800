"""The `kvkeep` command as a whole: which commands there are, and what its help does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvkeep.cli.main import COMMANDS, app

HEAVY = (
    "torch",
    "numpy",
    "rich",
    "msgspec",
    "xxhash",
    "asyncio",
    "kvkeep.tiers",
    "kvkeep.store",
    "kvkeep.wire",
    "kvkeep.bench",
)


def loaded(code: str) -> set[str]:
    """The modules of a new process that has run this code."""
    asked = (
        f"import sys\nsys.argv = ['kvkeep', '--help']\n{code}\nprint('\\n'.join(['', *sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.process
def test_help_loads_no_command_and_nothing_heavy() -> None:
    code = "from kvkeep.cli.main import app\ntry:\n    app()\nexcept SystemExit as end:\n    assert end.code == 0"
    found = loaded(code)
    assert "typer.main" in found
    assert found.isdisjoint({*HEAVY, *(module for module, _ in COMMANDS.values())})


def test_help_names_every_command_with_a_line() -> None:
    lines = CliRunner().invoke(app, ["--help"]).output.splitlines()
    for name in (*COMMANDS, "version"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


@pytest.mark.parametrize("name", [*COMMANDS, "version"])
def test_every_command_is_there(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert (result.exit_code, result.output.startswith("Usage: ")) == (0, True)
    assert f" {name} [" in result.output or f" {name} D" in result.output


def test_a_command_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(app, ["server"])
    assert result.exit_code == 2
    assert "server" in result.output


@pytest.mark.process
def test_a_command_runs_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvkeep.cli.main", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kvkeep ")
