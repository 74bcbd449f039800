"""When vLLM's runners write to blocks, beside when they say so: what a device still stores of them must come first."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


def source(module: str) -> str:
    """A module's text; it may not be importable without a GPU."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def test_the_first_runner_calls_us_before_it_writes_and_the_second_one_does_not():
    first = source("vllm.v1.worker.gpu_model_runner")
    told = first.index(".handle_preemptions(kv_connector_metadata)")
    assert told < first.index("self._update_states(scheduler_output)", told)
    assert "self._zero_block_ids(" in first[first.index("def _update_states(") :]
    second = source("vllm.v1.worker.gpu.model_runner")
    step = second[second.index("def execute_model(") :]
    assert step.index("self.update_requests(scheduler_output)") < step.index("self.kv_connector.pre_forward(")


CALLS = """
from types import SimpleNamespace
from kvkeep.doors.vllm import facts as vllm_facts
from kvkeep.doors.vllm.connector import KVKeepConnector
from kvkeep.doors.vllm.messages import PlanMeta

for config, wanted in (
    (SimpleNamespace(use_v2_model_runner=False), ["store"]),
    (SimpleNamespace(use_v2_model_runner=True), ["store", "order"]),
    (SimpleNamespace(), ["store", "order"]),
):
    called = []
    connector = object.__new__(KVKeepConnector)
    connector.worker = SimpleNamespace(
        start_stores=lambda _: called.append("store"), before_writes=lambda: called.append("order")
    )
    connector._sent = PlanMeta
    connector._writes_early = vllm_facts.writes_early(config)
    connector.wait_for_save()
    assert called == wanted, (config, called)
    connector.handle_preemptions(None)
    assert called == [*wanted, "order"]
assert KVKeepConnector.requires_piecewise_for_cudagraph({"transfer_mode": "layerwise"})
assert not KVKeepConnector.requires_piecewise_for_cudagraph({"transfer_mode": "bulk"})
assert not KVKeepConnector.requires_piecewise_for_cudagraph({})
"""


def test_stores_are_ordered_with_their_own_step_where_the_next_one_would_be_too_late():
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
