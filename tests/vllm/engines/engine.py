"""One real vLLM engine, with kvkeep or without, and the facts of what is asked of it.

A step has a name; what it answered is in `facts["steps"][name]`. The same steps run on an engine without kvkeep are the
reference. Knows nothing about what the facts ought to be.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker

from kvkeep.telemetry import by_flat_name, flat_name

if "BLOCKS_OUTERMOST" in os.environ:
    # what GPU backends say of themselves, and the CPU's can: its kernel reads a block at whatever stride
    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(lambda _: (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC))

if "OVERTAKEN_BY" in os.environ:
    # a checkpoint that is put in the place of the one that was just loaded, while the engine goes on starting
    load_model = Worker.load_model

    def load_and_replace(self: Worker, **more: Any) -> None:
        """Loads the model, and has its file replaced."""
        load_model(self, **more)
        target = Path(self.model_config.model, "model.safetensors")
        shutil.copyfile(os.environ["OVERTAKEN_BY"], target.with_suffix(".new"))
        target.with_suffix(".new").rename(target)

    Worker.load_model = load_and_replace

PLENTY = "64 MiB"
OPENING_S = 10.0


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids of single bytes: the same for the same seed, and a prefix of what a larger count gives."""
    source = random.Random(seed)
    return [source.randrange(256) for _ in range(count)]


@dataclass
class Engine:
    """`keep`: kvkeep's settings; None is an engine without a connector."""

    model: Path
    keep: dict[str, object] | None
    options: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=lambda: {"steps": {}})

    def __post_init__(self) -> None:
        options = {"dtype": "float32", "max_model_len": 4096, **self.options}
        if self.keep is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "KVKeepConnector",
                "kv_connector_module_path": "kvkeep.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"pool_size": PLENTY, **self.keep},
            }
        self.llm = LLM(model=str(self.model), enforce_eager=True, seed=0, disable_log_stats=False, **options)
        self.core = self.llm.llm_engine.engine_core
        self.facts["stores"] = store_processes(os.getpid())
        self._await_disk()

    def _await_disk(self) -> None:
        """Waits until the disk tier is open: on a busy machine a first request may come before it is."""
        connector = self._connector()
        if connector is None or connector.planner is None or "disk_path" not in (self.keep or {}):
            return
        client, end_s = connector.planner._link.client, time.monotonic() + OPENING_S
        while "disk_records" not in client.wait(client.stats(), OPENING_S).figures and time.monotonic() < end_s:
            time.sleep(0.01)

    def ask(self, name: str, *prompts: list[int], new_tokens: int = 8, salt: str = "", lora: Any = None) -> None:
        """Answers the prompts, all at once, and enters tokens, logprobs and what was reused."""
        before = self.metrics()
        more = {"cache_salt": salt} if salt else {}
        asked: list[Any] = [{"prompt_token_ids": prompt, **more} for prompt in prompts]
        outputs = self.llm.generate(asked, greedy(new_tokens), use_tqdm=False, lora_request=lora)
        self._enter(name, outputs, before)

    def reset(self) -> None:
        """Empties vLLM's own prefix cache; kvkeep keeps what it has."""
        assert self.llm.reset_prefix_cache()

    def leave_it_to_kvkeep(self) -> None:
        """Empties vLLM's own prefix cache where kvkeep is there: without it vLLM's own hit is the reference."""
        if self.keep is not None:
            self.reset()

    def metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges, kvkeep's among them, by name, as they stand in /metrics."""
        found: dict[str, float] = {}
        for family in REGISTRY.collect():
            if family.name.startswith(("vllm:", "kvkeep_")) and family.type in ("counter", "gauge"):
                for sample in family.samples:
                    if sample.name.endswith("_created"):
                        continue
                    name, tier = sample.name.removesuffix("_total"), sample.labels.get("tier", "")
                    if tier:
                        name = f"kvkeep_{flat_name(name.removeprefix('kvkeep_'), tier)}"
                    found[name] = found.get(name, 0) + sample.value
        return found

    def finish(self, shutdown: bool) -> None:
        """Enters the totals, asks a store that can be reached from here what it holds, and shuts the engine down."""
        connector = self._connector()
        self.facts["metrics"] = self.metrics()
        if connector is not None and connector.planner is not None:
            client = connector.planner._link.client
            stats = client.wait(client.stats(check=True), 10.0)
            self.facts["store"] = {**stats.figures, "problem": stats.problem}
            self.facts["figures"] = by_flat_name(connector.figures.rows())
        self.facts["in one process"] = connector is not None
        halves = [connector, get_kv_transfer_group()] if connector is not None and has_kv_transfer_group() else []
        self.facts["adapters held"] = [len(half._adapters._fresh) for half in halves]
        self.facts["refusal"] = connector.refusal if connector is not None else ""
        self.facts["layout"] = self.llm.llm_engine.vllm_config.cache_config.kv_cache_layout
        self.facts["ranges"] = self._ranges()
        self.facts["chain"] = connector.identity.chain if connector is not None and connector.identity else ""
        self.facts["policy"] = self.llm.llm_engine.vllm_config.kv_transfer_config and (
            self.llm.llm_engine.vllm_config.kv_transfer_config.kv_load_failure_policy
        )
        if shutdown:
            self.core.shutdown()

    def _ranges(self) -> list[str]:
        """What the rank in this process copies apart from each other; none if there is no such rank."""
        worker = get_kv_transfer_group().worker if has_kv_transfer_group() else None
        return list(worker.copies.shard().range_indexes) if worker is not None else []

    def _connector(self) -> Any:
        """The scheduler's connector where the engine runs in this process."""
        inner = getattr(self.core, "engine_core", None)
        return inner.scheduler.connector if inner is not None else None

    def _enter(self, name: str, outputs: list[Any], before: dict[str, float]) -> None:
        after = self.metrics()
        answers = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(one.values())).logprob for one in output.outputs[0].logprobs],
                "cached": output.num_cached_tokens,
                "end": output.outputs[0].finish_reason,
            }
            for output in outputs
        ]
        rise = {metric: int(value - before.get(metric, 0)) for metric, value in after.items()}
        assert name not in self.facts["steps"], name
        self.facts["steps"][name] = {
            "answers": answers,
            "external": rise["vllm:external_prefix_cache_hits"],
            "local": rise["vllm:prefix_cache_hits"],
            "rise": {metric: count for metric, count in rise.items() if count},
        }


def greedy(new_tokens: int) -> SamplingParams:
    """Greedy, exactly this many tokens, with the chosen tokens' logprobs."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0)


def store_processes(root: int) -> list[int]:
    """The pids of the store processes below process `root`."""
    found, parents = [], {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            parents[int(path.name)] = _parent(path)
    for pid in parents:
        ancestor = pid
        while ancestor and ancestor != root:
            ancestor = parents.get(ancestor, 0)
        if ancestor and b"kvkeep.store" in _command(pid):
            found.append(pid)
    return found


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
