"""One vLLM engine of the time-to-first-token benchmark: commands come as JSON lines on stdin, answers go to stdout.

`{"ask": TOKENS, "seed": N}` answers `{"ttft_s", "cpu_s", "cached", "token"}`, `{"stall": TOKENS, "seed": N}` how long a
running request is held up by one that arrives, `{"reset": true}` empties vLLM's own
prefix cache, an end of file ends the engine. Runs wherever vLLM is installed; knows nothing about who else is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",  # one thread on the same core for every engine: only one works at a time
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "KVKEEP_LOCAL_RESET": "keep",  # a reset of vLLM's own cache is how what is kept is measured
}
WARM_UP_TOKENS = (200, 1100)


def prompt(tokens: int, seed: int) -> list[int]:
    """The prompt of a seed; different seeds share no chunk."""
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(tokens)]


def cpu_seconds() -> float:
    """What this process and all that it has started have used, in CPU seconds."""
    import psutil

    me = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (me, *me.children(recursive=True)))


def start(model: str, dtype: str, transfer: dict[str, Any] | None) -> Any:
    """The engine, warmed up."""
    from vllm import LLM

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=8192 + 256,
        max_num_batched_tokens=8192,
        max_num_seqs=8,
        enforce_eager=True,
        seed=0,
        disable_log_stats=True,
        kv_transfer_config=transfer,
    )
    for tokens in WARM_UP_TOKENS:
        ask(llm, tokens, -tokens)
    return llm


def ask(llm: Any, tokens: int, seed: int) -> dict[str, Any]:
    """One question with one token of answer: the time from its arrival to that token."""
    from vllm import SamplingParams

    ids = {"prompt_token_ids": prompt(tokens, seed)}
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    cpu_s = cpu_seconds()
    begin = time.perf_counter()
    output = llm.generate([ids], sampling, use_tqdm=False)[0]
    ttft_s = time.perf_counter() - begin
    cpu_s = cpu_seconds() - cpu_s
    token = output.outputs[0].token_ids[0]
    return {"ttft_s": ttft_s, "cpu_s": cpu_s, "cached": output.num_cached_tokens, "token": token}


def stall(llm: Any, tokens: int, seed: int) -> dict[str, Any]:
    """The longest step of a running request from the arrival of another one to that one's first token.

    `ttft_s` is that of the one that arrives.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    short = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    engine.add_request("runs", {"prompt_token_ids": prompt(64, -1)}, long)
    for _ in range(10):
        engine.step()
    begin = time.perf_counter()
    engine.add_request("arrives", {"prompt_token_ids": prompt(tokens, seed)}, short)
    steps, here, cached = [], False, 0
    while not here:
        start = time.perf_counter()
        outputs = engine.step()
        steps.append(time.perf_counter() - start)
        for one in outputs:
            if one.request_id == "arrives":
                here, cached = True, one.num_cached_tokens
    ttft_s = time.perf_counter() - begin
    engine.abort_request(["runs"])
    while engine.has_unfinished_requests():
        engine.step()
    return {"stall_s": max(steps), "ttft_s": ttft_s, "cached": cached, "steps": len(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--transfer", type=json.loads, default=None, help="kv_transfer_config as JSON")
    options = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    llm = start(str(options.model), options.dtype, options.transfer)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        if "stall" in command:
            answer = stall(llm, command["stall"], command["seed"])
        elif "reset" in command:
            answer = {"reset": llm.reset_prefix_cache()}
        else:
            answer = ask(llm, command["ask"], command["seed"])
        print(json.dumps(answer), file=answers)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
