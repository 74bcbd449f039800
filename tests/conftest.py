"""Where asserts hold under `python -O` as well: pytest rewrites them in test modules, and here in what tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
HELPERS = [file for file in HERE.rglob("*.py") if not file.name.startswith(("test_", "conftest"))]

pytest.register_assert_rewrite(
    "kvkeep.testing", *(".".join(("tests", *file.relative_to(HERE).with_suffix("").parts)) for file in HELPERS)
)
