"""Minutes of mixed work in real vLLM with a pool and a disk that are too small; every answer is checked.

Prompts of all lengths that share beginnings, aborts at any moment, preemptions, resets of vLLM's own cache. The answers
are those of an engine without a cache; at the end nothing is pinned, the index adds up and memory has not grown.
Exits with 1 and says why if any of that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvkeep.bench.rows import say
from kvkeep.telemetry import by_flat_name

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROMPTS, STEMS, AT_ONCE = 48, 6, 6
MOST_GROWTH_NBYTES = 64 << 20


def prompts() -> list[list[int]]:
    """Prompts of 20 to 1,200 tokens; every eighth of them ends at a chunk's edge."""
    draw = random.Random(7)
    stems = [[draw.randrange(256) for _ in range(1200)] for _ in range(STEMS)]
    made = []
    for number in range(PROMPTS):
        stem, shared = stems[number % STEMS], draw.randrange(20, 900)
        length = draw.choice((256, 512, 768, 1024)) if number % 8 == 0 else draw.randrange(20, 1200)
        tail = [draw.randrange(256) for _ in range(max(0, length - shared))]
        made.append([*stem[: min(shared, length)], *tail])
    return made


def start(settings: dict[str, Any] | None, seed_blocks: int | None) -> Any:
    """An engine; without settings one that keeps nothing, not even in vLLM's own cache."""
    from vllm import LLM

    transfer = {
        "kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"local_reset": "keep", **(settings or {})},
    }
    return LLM(
        model=str(ROOT / "build" / "models" / "tiny"),
        dtype="float32",
        max_model_len=1280,
        max_num_batched_tokens=512,
        block_size=32,
        enforce_eager=True,
        seed=0,
        num_gpu_blocks_override=seed_blocks,
        enable_prefix_caching=settings is not None,
        kv_transfer_config=transfer if settings is not None else None,
    )


def sampling(number: int) -> Any:
    """How a prompt is answered: greedy, 4 to 40 tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=4 + number % 37, ignore_eos=True, detokenize=False)


def reference(file: Path) -> None:
    """Writes the answers of an engine without a cache, one prompt at a time."""
    llm, answers = start(None, None), []
    for number, prompt in enumerate(prompts()):
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling(number), use_tqdm=False)
        answers.append(list(output.outputs[0].token_ids))
    file.write_text(json.dumps(answers))
    llm.llm_engine.engine_core.shutdown()


def resident() -> int:
    """Bytes of this process that are its own."""
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """One engine under work, and what it has done."""

    def __init__(self, llm: Any, right: list[list[int]], seed: int) -> None:
        self.llm, self.engine, self.right = llm, llm.llm_engine, right
        self.prompts, self.draw = prompts(), random.Random(seed)
        self.open: dict[str, int] = {}
        self.counts = dict.fromkeys(("asked", "checked", "aborted", "reset"), 0)
        self.wrong: list[str] = []

    def turn(self) -> None:
        """Something new, and a step."""
        if len(self.open) < AT_ONCE and self.draw.random() < 0.4:
            number, name = self.draw.randrange(PROMPTS), f"r{self.counts['asked']}"
            self.engine.add_request(name, {"prompt_token_ids": self.prompts[number]}, sampling(number))
            self.open[name] = number
            self.counts["asked"] += 1
        if self.open and self.draw.random() < 0.02:
            name = self.draw.choice(sorted(self.open))
            self.engine.abort_request([name])
            del self.open[name]
            self.counts["aborted"] += 1
        if not self.open and self.draw.random() < 0.5:
            self.counts["reset"] += bool(self.llm.reset_prefix_cache())
        self.step()

    def step(self) -> None:
        """One step; what has ended is checked."""
        for output in self.engine.step():
            if output.finished and output.request_id in self.open:
                number = self.open.pop(output.request_id)
                answer = list(output.outputs[0].token_ids)
                self.counts["checked"] += 1
                if answer != self.right[number]:
                    self.wrong.append(f"prompt {number}: {answer} instead of {self.right[number]}")

    def finish(self) -> None:
        """Until all is answered, and the last reports are in."""
        while self.engine.has_unfinished_requests():
            self.step()
        for _ in range(50):
            self.step()


def settled(client: Any) -> Any:
    """The store's account once it has written to disk what waits: a chunk is held while it is written. Or as it is."""
    for _ in range(200):
        stats = client.wait(client.stats(check=True), 20.0)
        if not stats.figures["disk_flush_waiting"]:
            break
        time.sleep(0.1)
    return stats


def soak(options: argparse.Namespace, right: list[list[int]], disk: str) -> list[str]:
    """Works for the given minutes; what is not as it should be."""
    keep = {"pool_size": "3 MiB", "disk_path": disk, "disk_size": "6 MiB", "disk_min_free": "1 MiB", "deadline_s": 5.0}
    llm = start({**keep, **json.loads(options.settings)}, 80)
    work = Soak(llm, right, options.seed)
    begin, grown_from, told = time.monotonic(), 0, 0.0
    limit_s = options.minutes * 60
    while (spent := time.monotonic() - begin) < limit_s:
        work.turn()
        if not grown_from and spent > limit_s / 2:
            grown_from = resident()
        if spent - told > 30:
            told = spent
            say(f"{spent:.0f} s: {work.counts}, wrong {len(work.wrong)}, {resident() >> 20} MiB")
    work.finish()
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    preempted = connector.figures.count("claimed_after_preemption_tokens")
    say(f"figures: { {name: value for name, value in by_flat_name(connector.figures.rows()).items() if value} }")
    stats = settled(connector.planner._link.client)
    faults = work.wrong[:5]
    faults += [stats.problem] if stats.problem else []
    held = {name: stats.figures[name] for name in ("pinned_nbytes", "writing_nbytes", "dead_nbytes")}
    faults += [f"held at the end: {held}"] if any(held.values()) else []
    growth = resident() - grown_from
    faults += [f"memory grew by {growth >> 20} MiB"] if growth > MOST_GROWTH_NBYTES else []
    say(
        f"{work.counts}, loaded after preemption {preempted} tokens, memory {growth >> 20:+} MiB, store {stats.figures}"
    )
    llm.llm_engine.engine_core.shutdown()
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--settings", default='{"load": "async", "transfer_mode": "layerwise"}', help="kvkeep's, as JSON"
    )
    parser.add_argument("--reference", type=Path, help="only write the answers of an engine without a cache")
    options = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    if options.reference is not None:
        reference(options.reference)
        return
    with tempfile.TemporaryDirectory(prefix="kvkeep-soak-") as folder:
        file = Path(folder) / "right.json"
        subprocess.run([sys.executable, __file__, f"--reference={file}"], check=True)
        faults = soak(options, json.loads(file.read_text()), folder)
    for fault in faults:
        say(f"FAULT {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
