"""What pyproject.toml declares is what kvkeep imports, in both directions, and each has a lower bound that is tested."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def modules(requirements: Iterable[str]) -> set[str]:
    """The modules of distributions, which have the same names here."""
    return {re.split(r"[^\w.-]", one)[0].replace("-", "_").lower() for one in requirements}


def imports(*folders: str) -> set[str]:
    """What the files of these folders import from elsewhere, wherever in them."""
    found = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"kvkeep"}


EXTRAS = {name: modules(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}


def test_what_is_imported_is_declared() -> None:
    declared = modules(PROJECT["dependencies"]).union(*EXTRAS.values())
    assert imports("src") - declared == set()
    core = imports(*(f"src/kvkeep/{folder}" for folder in ("cli", "core", "memory", "store", "tiers", "wire")))
    assert core - modules(PROJECT["dependencies"]) == set(), "the core has no extras"


def test_what_is_declared_is_imported() -> None:
    assert modules(PROJECT["dependencies"]) - imports("src") == set()
    # the demo draws
    assert set().union(*EXTRAS.values()) - imports("src", "demo") == set()


def test_every_dependency_of_the_core_has_a_lower_bound() -> None:
    """`make lowest` runs the core's tests with it."""
    assert [one for one in PROJECT["dependencies"] if not re.fullmatch(r"[\w.-]+>=[\w.]+,<[\w.]+", one)] == []
