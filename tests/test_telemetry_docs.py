"""docs/reference/metrics.md names every figure and every reason, in the code's own words."""

from __future__ import annotations

import re
from pathlib import Path

from kvkeep.telemetry import COUNTERS, GAUGES, Miss

REFERENCE = Path(__file__).parents[1] / "docs/reference/metrics.md"


def rows(head: str) -> dict[str, str]:
    """The first two columns of the table with this head."""
    table = REFERENCE.read_text().split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.M))


def test_every_reason_for_a_miss():
    assert rows("miss") == {why.name.lower(): why.value for why in Miss}


def test_every_counter_and_gauge():
    assert rows("counter") == COUNTERS
    assert rows("gauge") == GAUGES
