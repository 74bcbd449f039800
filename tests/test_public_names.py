"""The public names: cheap to import, there, and documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvkeep
from kvkeep import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ERRORS = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
NO_ERRORS = sorted(set(kvkeep.__all__) - set(vars(errors)))


def loaded(code: str) -> set[str]:
    """The modules of a new process that has run this code."""
    code += "\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.process
def test_importing_kvkeep_loads_nothing_heavy() -> None:
    found = loaded("import kvkeep")
    assert {name for name in found if name.startswith("kvkeep")} == {"kvkeep", "kvkeep.errors"}
    assert found.isdisjoint({"torch", "numpy", "msgspec", "vllm", "asyncio"})


@pytest.mark.process
def test_settings_need_no_numpy_and_no_torch() -> None:
    found = loaded("from kvkeep import Config, Disk; Config(tiers=[Disk(path='/a')])")
    assert found.isdisjoint({"torch", "numpy", "vllm", "asyncio"})


@pytest.mark.parametrize("name", kvkeep.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert name in dir(kvkeep)
    assert (getattr(kvkeep, name).__doc__ or "").strip()


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        kvkeep.Cache  # noqa: B018
    assert kvkeep.__all__ == sorted(kvkeep.__all__, key=lambda name: (name[0].islower(), name))


def test_every_error_is_public_and_in_the_table() -> None:
    tree = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert tree == set(ERRORS) == set(kvkeep.__all__) - set(NO_ERRORS)
    assert all(all(cell.strip() for cell in cells.split(" | ")) for cells in ERRORS.values())


def test_every_other_name_has_its_section() -> None:
    assert sorted(SECTIONS) == NO_ERRORS


@pytest.mark.parametrize("name", NO_ERRORS)
def test_a_section_says_what_it_takes_raises_and_where_it_is(name: str) -> None:
    points = dict(re.findall(r"^- (Takes|Errors|Source): (.*?)(?=^- |\Z)", SECTIONS[name], re.MULTILINE | re.DOTALL))
    assert points.keys() == {"Takes", "Errors", "Source"}
    (source,) = re.findall(r"`(.+)`", points["Source"])
    assert re.search(rf"^(class|def) {name}\b", (ROOT / source).read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"`(\w+Error|\w+Mismatch|\w+Gone|\w+Unavailable)`", points["Errors"]))
    assert named <= {*ERRORS, "TypeError", "ValueError"}
