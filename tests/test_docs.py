"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "docs" / "reference" / "known-faults.md"


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", FAULTS.read_text())
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing


def test_every_case_that_is_named_is_measured():
    cases = re.findall(r"cases? ((?:`[\w-]+`(?:, )?)+)", FAULTS.read_text())
    source = "".join(file.read_text() for file in (ROOT / "src" / "kvkeep" / "bench").glob("*.py"))
    assert len(cases) == 3
    for name in re.findall(r"`([\w-]+)`", " ".join(cases)):
        assert f'"{name}"' in source, name
