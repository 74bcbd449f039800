"""After every engine run: kvkeep's figures agree with vLLM's, nothing is held, and nothing is left behind.

`kept` is the facts of each engine run with kvkeep in turn.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

ENDING_S = 20.0
pytestmark = pytest.mark.vllm


def test_claims_equal_vllms_external_hits(kept):
    assert kept.figure("claimed_first_tokens") == kept.metric("external_prefix_cache_hits")
    assert kept.figure("claimed_first_tokens") > 0


def test_what_was_claimed_was_delivered_or_failed(kept):
    claimed = kept.figure("claimed_first_tokens") + kept.figure("claimed_after_preemption_tokens")
    assert kept.figure("delivered_tokens") == claimed - kept.figure("failed_tokens")
    assert kept.figure("failed_tokens") == 0


def test_nothing_is_held_and_the_index_adds_up(kept):
    if not kept.stats:
        pytest.skip("this run's private store cannot be asked from outside the engine's process")
    assert kept.stats["problem"] == ""
    held = {name: kept.stats[name] for name in ("pinned_nbytes", "writing_nbytes", "dead_nbytes", "quarantined_nbytes")}
    assert held == dict.fromkeys(held, 0)


def test_a_private_store_ends_with_its_engine(kept):
    assert bool(kept.facts["stores"]) == kept.private
    end_s = time.monotonic() + ENDING_S
    while left := [pid for pid in kept.facts["stores"] if "kvkeep.store" in command_of(pid)]:
        assert time.monotonic() < end_s, f"{left} go on"  # it writes what waits for the disk first
        time.sleep(0.05)


def test_an_engine_that_was_shut_down_leaves_no_folder(kept):
    if kept.killed:
        pytest.skip("vLLM killed the engine before it had shut down")
    left = list(kept.folder.glob("kvkeep-*"))
    assert bool(left) != kept.shutdown  # one that was killed does: this look finds them


def test_failed_loads_would_be_computed_again(kept):
    if not kept.facts["in one process"]:
        pytest.skip("the engine's own copy of its configuration is in another process")
    assert kept.facts["policy"] == "recompute"


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
