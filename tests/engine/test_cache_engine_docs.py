"""The examples of docs/reference/cache-engine.md run and say the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cache-engine.md"


@pytest.mark.process
def test_the_examples_run():
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first, str(PAGE), "exec"), names)
    assert names["hit"] == 96
    assert names["arrived"].tolist() == [n < 96 for n in range(100)]
    assert (names["step"], names["done"].sum()) == (5, 96)
    for cache in names["caches"].values():
        for first in (11, 21):
            assert torch.equal(cache[:, first : first + 6].view(torch.int32), cache[:, 1:7].view(torch.int32))

    exec(compile(second, str(PAGE), "exec"), names)
    assert {at: (mask.sum(), len(mask)) for at, mask in names["found"].items()} == {0: (0, 32), 32: (64, 64)}
    for cache in names["caches"].values():
        assert torch.equal(cache[1, 33:37], cache[1, 1:5]), "V has moved as it was"
        assert not torch.equal(cache[0, 33:37], cache[0, 1:5]), "K has turned"
