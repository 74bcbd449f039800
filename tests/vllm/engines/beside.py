"""Loads beside the steps that fail, or whose request goes away: `beside.py MODEL plain|kvkeep TP`; facts as JSON."""

from __future__ import annotations

import json
import sys

from hazards import P, Q, Run


def fails(run: Run, calls: list[int]) -> dict[str, object]:
    """The scatters of these numbers fail; another request has the same prefix and its own load."""
    run.restore()
    failed = run.connector.figures.count("failed_tokens")
    run.arm(calls)
    p, q = run.add(P), run.add(Q)
    run.finish()
    facts = {"p": run.answers[p], "q": run.answers[q], "stats": run.stats()}
    facts["failed"] = run.connector.figures.count("failed_tokens") - failed
    run.forget()
    return facts | {"p_again": run.ask(P), "q_again": run.ask(Q)}


def given_up(run: Run) -> dict[str, object]:
    """The user goes away in the step in which the load begins."""
    run.restore()
    run.arm([])
    name = run.add(P)
    run.step()
    run.engine.abort_request([run.internal(name)], internal=True) if run.scheduler.requests else None
    for _ in range(50):  # an engine without requests makes its steps only as long as it is told that work is left
        run.step()
    run.finish()
    free = run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    total = run.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    return {"free": free, "total": total, "p": run.ask(P), "stats": run.stats()}


def main() -> None:
    model, kind, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run = Run(model, kind == "kvkeep", ranks, load="async")
    facts: dict[str, object] = {"cold": {"p": run.ask(P), "q": run.ask(Q)}}
    if kind == "kvkeep":
        facts["first"] = fails(run, [0])
        facts["second"] = fails(run, [1])
        facts["all"] = fails(run, list(range(8)))
        facts["given up"] = given_up(run)
    print("FACTS " + json.dumps(facts), flush=True)
    run.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
