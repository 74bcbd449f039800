"""Writes the table of figures in README.md from bench/results: no number there was typed by hand.

`python scripts/figures.py` writes it; `tests/test_docs.py` fails where README and the results differ. The measurements
themselves are commands: `make peers` and `python bench/restart.py --json bench/results/restart.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python scripts/figures.py -->\n", "<!-- end of figures -->"


def measured(file: str, case: str) -> dict[str, Any]:
    """The row of a case in one of the files of bench/results."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return next(row for row in rows if row["case"] == case)


def seconds(value: float) -> str:
    """Seconds with as many digits as the measurement is worth."""
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def table() -> str:
    """Medians of seconds to the first token of a prompt of 4,096 tokens, and the commands that made them."""
    warm, peer = measured("ttft.json", "ttft-4k-warm-vs-cold"), measured("ttft.json", "ttft-4k-warm-vs-lmcache")
    cold, restart = (
        measured("ttft.json", "ttft-4k-cold-vs-plain"),
        measured("restart.json", "ttft-4k-restart-vs-lmcache"),
    )
    alone = cold["yardstick_median"]
    rows = [
        ("came before, and vLLM's own cache has lost it", alone, warm["median"], peer["yardstick_median"]),
        ("came before a restart (kept on disk)", alone, restart["median"], restart["yardstick_median"]),
        ("new: computed, and stored", alone, cold["median"], None),
    ]
    lines = ["| prompt of 4,096 tokens | vLLM alone | with kvkeep | with LMCache 0.5.6 |", "|---|---|---|---|"]
    for what, *values in rows:
        cells = ["" if value is None else seconds(value) for value in values]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    machine = warm["machine"].rsplit(", load", 1)[0]
    lines += ["", f"Medians on {machine}, made by `{warm['command']}` and", f"`{restart['command']}`.", ""]
    return "\n".join(lines)


def written(text: str) -> str:
    """The README `text` with the table as the results have it."""
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
