"""Prints the core's dependencies, each at the lowest version that pyproject.toml allows: for pip's -r."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(requirements: list[str]) -> list[str]:
    """Each requirement with its lower bound as the only version, as "numpy==1.26" of "numpy>=1.26,<3"."""
    pinned = []
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
        if match is None:
            raise SystemExit(f"{PYPROJECT}: {requirement!r} has no lower bound: write it as name>=1.2,<2")
        pinned.append(f"{match[1]}=={match[2]}")
    return pinned


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])))
