"""The example of docs/reference/cache-engine.md runs and says the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cache-engine.md"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert names["hit"] == 96
    assert names["arrived"].tolist() == [n < 96 for n in range(100)]
    assert (names["step"], names["done"].sum()) == (5, 96)
    for cache in names["caches"].values():
        for first in (11, 21):
            assert torch.equal(cache[:, first : first + 6].view(torch.int32), cache[:, 1:7].view(torch.int32))
