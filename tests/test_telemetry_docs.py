"""docs/reference/metrics.md names every figure and every reason, in the code's own words."""

from __future__ import annotations

import re
from pathlib import Path

from kvkeep.telemetry import COUNTERS, GAUGES, MISSES, TIER_COUNTERS, Miss

REFERENCE = Path(__file__).parents[1] / "docs/reference/metrics.md"


def rows(head: str) -> dict[str, tuple[str, ...]]:
    """The table with this head, by the name in its first column."""
    table = REFERENCE.read_text().split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0]
    lines = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M)
    return {name: tuple(rest.split(" | ")) for name, rest in lines}


def texts(names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (text,) for name, text in names.items()}


def test_every_reason_for_a_miss():
    assert rows("miss") == {why.value: tuple(MISSES[why]) for why in Miss}


def test_every_counter_and_gauge():
    assert rows("counter") == texts(COUNTERS)
    assert rows("counter by tier") == texts(TIER_COUNTERS)
    assert rows("gauge") == texts(GAUGES)
