"""Runs the two hazards on one engine and prints its facts as JSON: `hazards.py MODEL plain|kvkeep TP`.

The engine core is in this process, so that single steps, aborts and preemptions can be placed exactly.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # the tests' own functions go to the workers
)
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if sys.argv[3] == "2" else "0"

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvkeep.core.key import Chain, none_hash
from kvkeep.engine.copies.copies import Kind
from kvkeep.telemetry import by_flat_name
from kvkeep.testing.doubles.transfers import FaultyTransfer

BLOCK = 32


def prompt(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(count)]


P = prompt(1, 600)
Q = [*P[:512], *prompt(2, 60)]  # the same two chunks, another end
LONG = [*P[:512], *prompt(2, 700)]  # the same two chunks, and much that is computed from them
R = prompt(3, 300)
X = [*P[:BLOCK], *prompt(4, 9)]  # the same first block


def fail_next(worker: object, rank: int, calls: list[int]) -> None:
    """In a worker: the transfer of `rank` fails its next scatters numbered `calls`; on other ranks nothing changes."""
    half = get_kv_transfer_group().worker
    transfers = half.copies.transfers
    inner = transfers[Kind.CHUNK]
    inner = inner.inner if isinstance(inner, FaultyTransfer) else inner
    mine = worker.vllm_config.parallel_config.rank == rank
    transfers[Kind.CHUNK] = FaultyTransfer(inner, failing_calls=set(calls) if mine else set())


def block_bytes(worker: object, block: int) -> list[str]:
    """In a worker: one block's bytes in every layer."""
    layers = get_kv_transfer_group().worker.copies.transfers[Kind.CHUNK].inner._parts[0]
    return [part.pages[block].tobytes().hex() for layer in layers for part in layer]


def spoil_pool(worker: object, offset: int, nbytes: int, rank: int) -> None:
    """In the worker of `rank`: other bytes in the pool, so that a copy of them is seen."""
    if worker.vllm_config.parallel_config.rank == rank:
        pool = get_kv_transfer_group().worker.pool._pool
        pool._region.array[offset : offset + nbytes] ^= 255


class Run:
    def __init__(
        self, model: str, kvkeep: bool, ranks: int, options: dict[str, object] | None = None, **more: object
    ) -> None:
        extra = {**more, "pool_size": "64 MiB", "patience_s": 2.0, "deadline_s": 20.0, "verify_pool": "off"}
        extra["local_reset"] = "keep"  # how what is kept is asked for in one process
        config = {
            "kv_connector": "KVKeepConnector",
            "kv_connector_module_path": "kvkeep.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        self.llm = LLM(
            model=model,
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            seed=0,
            disable_log_stats=False,
            tensor_parallel_size=ranks,
            kv_transfer_config=config if kvkeep else None,
            **{"block_size": BLOCK, **(options or {})},
        )
        self.ranks = ranks
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.connector = self.scheduler.connector
        self.count = 0
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, tokens: list[int], answer: int = 8) -> str:
        self.count += 1
        name = f"r{self.count}"
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
        return name

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
                self.reasons[output.request_id] = output.outputs[0].finish_reason

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def ask(self, tokens: list[int], answer: int = 8) -> list[int]:
        name = self.add(tokens, answer)
        self.finish()
        return self.answers[name]

    def internal(self, name: str) -> str:
        """vLLM's own name of a request."""
        return next(one for one in self.scheduler.requests if one.startswith(name))

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()

    def arm(self, calls: list[int]) -> None:
        self.llm.collective_rpc(fail_next, args=(self.ranks - 1, calls))

    def restore(self) -> None:
        """An empty kvkeep that has stored P, an empty prefix cache of vLLM's."""
        assert self.llm.reset_prefix_cache(reset_connector=True)
        self.ask(P)
        self.forget()

    def client(self) -> object:
        return self.connector.planner._link.client

    def stats(self) -> dict[str, object]:
        answer = self.client().wait(self.client().stats(check=True), 20.0)
        return {"problem": answer.problem, **answer.figures}

    def readable(self, tokens: list[int]) -> int:
        """How many leading chunks of a prompt the store would give."""
        answer = self.client().wait(self.client().fetch(Chain(256, none_hash()).extend(tokens)), 20.0)
        self.client().release(answer.lease)
        return len(answer.offsets)


def failed_load(run: Run) -> dict[str, object]:
    """One request's load fails while another's chunk is stored in the same step."""
    run.restore()
    run.arm([0])
    p, r = run.add(P), run.add(R)
    run.step()
    facts: dict[str, object] = {"readable_r": run.readable(R), "readable_p": run.readable(P)}
    run.finish()
    run.forget()
    facts |= {"p": run.answers[p], "r": run.answers[r], "q": run.ask(Q), "p_again": run.ask(P)}
    return facts | {"stats": run.stats(), "figures": by_flat_name(run.connector.figures.rows())}


def ended_before_recompute(run: Run, how: str) -> dict[str, object]:
    """Between its failed load and its recompute the request is aborted, or preempted and then aborted.

    It is alone: beside another one that begins alike its load would be beside the step.
    """
    run.restore()
    run.arm([0])
    name = run.add(P)
    run.step()
    if how == "preempt":
        request = run.scheduler.requests[run.internal(name)]
        run.scheduler.running.remove(request)
        run.scheduler._preempt_request(request, time.monotonic())
    run.engine.abort_request([run.internal(name)], internal=True)
    run.step()
    q = run.ask(Q)
    run.finish()
    return {"q": q, "p": run.ask(P), "stats": run.stats()}


def built_on_a_failed_load(run: Run) -> dict[str, object]:
    """Another request of the step has read the blocks that failed; what it computed from them must not stay either."""
    run.restore()
    run.arm([0, 1])
    name, sharing = run.add(P), run.add(LONG, answer=24)
    run.step()
    run.engine.abort_request([run.internal(name), run.internal(sharing)], internal=True)
    run.step()
    run.ask([*P[:512], *prompt(9, 40)])  # computes the shared blocks anew, so that their chain is whole again
    return {"long": run.ask(LONG, answer=24), "stats": run.stats()}


def partial_load(run: Run) -> dict[str, object]:
    """vLLM holds one block of a prompt, another request reads it, and kvkeep loads the rest of two chunks."""
    run.restore()
    run.arm([])
    reader = run.add(X, answer=40)
    run.step()
    request = run.scheduler.requests[run.internal(reader)]
    block = run.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0][0]
    client = run.client()
    answer = client.wait(client.fetch(Chain(256, none_hash()).extend(P)), 20.0)
    # the first block's bytes in the pool are spoilt in every layer: if they were copied it would be seen
    shard = run.connector.planner._layout.shards[0]
    page = shard.groups[0].layers[0].page_nbytes
    for rank in range(run.ranks):
        for one in shard.ranges:
            offset = answer.offsets[0] + run.connector.planner._layout.shard_offset(rank) + one.offset
            run.llm.collective_rpc(spoil_pool, args=(offset, page, rank))
    client.release(answer.lease)
    before = run.llm.collective_rpc(block_bytes, args=(block,))
    claimed = run.connector.figures.count("claimed_first_tokens")
    p = run.add(P)
    run.step()
    after = run.llm.collective_rpc(block_bytes, args=(block,))
    claimed = run.connector.figures.count("claimed_first_tokens") - claimed
    run.finish()
    return {
        "same_bytes": before == after,
        "not_zero": any(any(byte != "0" for byte in part) for part in before[0]),
        "claimed": claimed,
        "p": run.answers[p],
        "x": run.answers[reader],
        "stats": run.stats(),
    }


def main() -> None:
    model, kind, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run = Run(model, kind == "kvkeep", ranks)
    facts: dict[str, object] = {
        "cold": {
            "p": run.ask(P),
            "q": run.ask(Q),
            "r": run.ask(R),
            "x": run.ask(X, answer=40),
            "long": run.ask(LONG, answer=24),
        }
    }
    if kind == "kvkeep":
        facts["failed_load"] = failed_load(run)
        facts["abort"] = ended_before_recompute(run, "abort")
        facts["preempt"] = ended_before_recompute(run, "preempt")
        facts["built_on"] = built_on_a_failed_load(run)
        facts["partial"] = partial_load(run)
        metrics = {one.name: one.value for one in run.llm.get_metrics() if one.name.startswith("vllm:external_prefix")}
        facts["metrics"] = metrics
        facts["figures"] = by_flat_name(run.connector.figures.rows())
    print("FACTS " + json.dumps(facts), flush=True)
    run.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
