"""An engine's process loads no module of the store or of its tiers: it knows the store by the wire alone."""

from __future__ import annotations

import sys
from subprocess import run

import pytest

LIMIT_S = 120.0
LOADED = """
import sys
others = [name for name in sys.modules if (name + ".").startswith(("kvkeep.store.", "kvkeep.tiers."))]
print("loaded:", *others)
"""
PLANNER_AND_WORKER = """
from kvkeep.config import Config
from kvkeep.engine.link import PrivateSource
from kvkeep.engine.scheduler.planner import PlannerOptions
from kvkeep.testing.fake_engine.engine import FakeEngine
from kvkeep.testing.fake_engine.request import EngineShape

shape = EngineShape(chunk_tokens=16)
options = PlannerOptions(deadline_s=30.0, patience_s=30.0)
engine = FakeEngine(shape, PrivateSource(Config(pool_size=1 << 20, log_level="error")), options)
for name, prompt in (("first", range(40)), ("evicts the first from the engine's own cache", range(1000, 1250))):
    engine.add(name, prompt)
    engine.run()
engine.add("again", [*range(32), 7, 7])
engine.run()
assert engine.external_tokens, "nothing was loaded"
engine.close()
"""
LIBRARY = """
import torch
from kvkeep import Config, GroupCaches, Model, open_cache

group = GroupCaches({"layer": torch.randn(2, 8, 16, 2, 8)}, 8, 16, window=0)
with open_cache([group], Model("tiny"), Config(pool_size="1 MiB", chunk_tokens=16)) as cache:
    assert cache.store(range(32), [[1, 2]]) == 32
    assert cache.retrieve(range(32), [[3, 4]]).all()
"""


def loaded(script: str) -> str:
    """What of the store a process has loaded that has run this."""
    done = run([sys.executable, "-c", script + LOADED], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.process
@pytest.mark.parametrize("script", [PLANNER_AND_WORKER, LIBRARY], ids=["planner and worker", "library"])
def test_an_engine_that_keeps_and_loads_knows_the_store_by_the_wire(script: str) -> None:
    assert loaded(script) == "loaded:"


@pytest.mark.process
def test_the_look_at_the_modules_sees_those_of_the_store() -> None:
    assert "kvkeep.store.store" in loaded("import kvkeep.store.store")
    assert loaded("import kvkeep.tiers") == "loaded: kvkeep.tiers"


@pytest.mark.vllm
@pytest.mark.process
def test_the_connector_that_vllm_loads_knows_the_store_by_the_wire() -> None:
    pytest.importorskip("vllm")
    assert loaded("import kvkeep.vllm; kvkeep.vllm.KVKeepConnector") == "loaded:"
