"""ARCHITECTURE.md's two paths are what happens: each function that it names is called, in that order, in a real run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.traced import traced

ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"
MOST_MODULES = 22


def paths() -> dict[str, list[list[tuple[str, str]]]]:
    """The legs of each path: steps as (end of the module's name, function)."""
    section = ARCHITECTURE.read_text().split("## The two paths")[1].split("\n## ")[0]
    blocks = re.findall(r"^    (store|retrieve):(.*\n(?:     +.*\n)*)", section, re.M)
    return {name: [re.findall(r"([\w/]+)\.(\w+)", leg) for leg in text.split("·")] for name, text in blocks}


@pytest.mark.process
def test_each_step_of_both_paths_is_taken_in_its_order(tmp_path: Path) -> None:
    calls = traced(tmp_path)
    for path, steps in ((path, steps) for path, legs in paths().items() for steps in legs):
        following = iter(calls[path])
        for module, function in steps:
            found = any(
                f"/{name.replace('.', '/')}".endswith(f"/{module}") and qualified.rsplit(".", 1)[-1] == function
                for _, name, qualified in following
            )
            assert found, f"{path}: {module}.{function} is not called after the step before it"


def test_a_newcomer_can_follow_both_paths() -> None:
    assert paths().keys() == {"store", "retrieve"}
    for legs in paths().values():
        assert 15 < len({module for steps in legs for module, _ in steps}) <= MOST_MODULES - 1, "and the connector"
