"""Loads that fail where vLLM's own policy is kept, which is to fail the request: `fails.py MODEL sync|async 1`."""

from __future__ import annotations

import json
import sys

from hazards import P, Q, R, Run


def main() -> None:
    run = Run(sys.argv[1], True, 1, load=sys.argv[2], load_failure_policy="keep")
    facts: dict[str, object] = {"cold": {"q": run.ask(Q), "r": run.ask(R)}}
    run.restore()
    run.arm([0])
    p, r = run.add(P), run.add(R)
    run.finish()
    facts["reasons"] = {"p": run.reasons[p], "r": run.reasons[r]}
    facts["r"] = run.answers[r]
    facts["q"] = run.ask(Q)  # what failed is not in vLLM's own cache either
    for _ in range(20):
        run.step()
    free = run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    total = run.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    print("FACTS " + json.dumps({**facts, "held": total - free, "stats": run.stats()}), flush=True)
    run.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
