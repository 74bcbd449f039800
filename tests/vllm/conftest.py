"""Engine runs for the tests in this folder: each is one process, run once when a test first asks for its facts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvkeep.cli.ask import ask_stats
from kvkeep.config import Config

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "build" / "models"
RUN = Path(__file__).parent / "engines" / "run.py"
USED_MODELS = ("tiny", "tinyb", "smollm2", "hybrid", "mla", "lfm2", "qwen3next")
LIMIT_S = 400


@dataclass
class Facts:
    """What an engine run found out. `stats`: its store's own account, after the engine ended if the store is shared."""

    facts: dict[str, Any]
    folder: Path
    job: Job
    stats: dict[str, Any]

    @property
    def private(self) -> bool:
        """Whether the engine started its own store."""
        return not self.job.store

    @property
    def shutdown(self) -> bool:
        """Whether the engine was shut down; if not its process just ended."""
        return self.job.shutdown

    @property
    def killed(self) -> bool:
        """Whether vLLM did not wait for the end of its engine: it gives it 5 s, which a busy machine may use up."""
        return "force killing" in (self.folder / "log").read_text(errors="replace")

    def step(self, name: str) -> dict[str, Any]:
        return self.facts["steps"][name]

    def answers(self, name: str) -> list[dict[str, Any]]:
        return self.step(name)["answers"]

    def external(self, name: str) -> int:
        """The tokens that vLLM says it got from its connector in this step."""
        return self.step(name)["external"]

    def reused(self, name: str) -> int:
        """The tokens that vLLM did not compute in this step: from its connector and from its own cache.

        Of two requests that begin alike each loads its own part, unless the second arrives after the first was loaded.
        """
        return self.external(name) + self.step(name)["local"]

    def figure(self, name: str) -> int:
        """One of kvkeep's figures over the whole run."""
        return int(self.facts["metrics"][f"kvkeep_{name}"])

    def metric(self, name: str) -> int:
        """One of vLLM's over the whole run."""
        return int(self.facts["metrics"][f"vllm:{name}"])


@dataclass
class SharedStore:
    """A store process of our own that outlives engines."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def path(self) -> Path:
        return self.folder / "store"

    def stats(self) -> dict[str, Any]:
        answer = ask_stats(str(self.path), check=True)
        return {**answer.figures, "problem": answer.problem}


@dataclass(frozen=True)
class Job:
    """One engine: what is asked of it (a function of engines/scenarios.py), and how it is started.

    `keep`: kvkeep's settings, None for a reference. `store`: the name of the shared store that it joins. `cpu_flag`:
    what vLLM needs of the CPU for this; the tests are skipped on one without it. `disk`: the name of the folder of its
    disk tier. `after`: the engine that must have ended before.
    """

    scenario: str
    model: str = "tiny"
    keep: dict[str, object] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    store: str = ""
    shutdown: bool = True
    cpu_flag: str = ""
    disk: str = ""
    after: str = ""


PATIENT: dict[str, object] = {"patience_s": 2.0, "deadline_s": 20.0, "local_reset": "keep"}
"""For every kept run: a busy machine must not make kvkeep leave a slow store alone, for then it reuses nothing; and a
reset of vLLM's own cache is how what is kept is asked for in one process."""
EARLY: dict[str, object] = {
    "early_loads": True,
    "transfer_mode": "layerwise",
    "load": "sync",
}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 512, "max_model_len": 1280, "block_size": 32}
SMALL_STEPS: dict[str, Any] = {"max_num_batched_tokens": 512}
TIGHT: dict[str, Any] = {**CHUNKED, "num_gpu_blocks_override": 42}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
NGRAM: dict[str, Any] = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
FP8: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}  # the CPU build has no FP8 beside float32
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
TWO_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

ACROSS: dict[str, object] = {"cross_layer_blocks": True, "transfer_mode": "bulk"}
OUTERMOST = {"BLOCKS_OUTERMOST": "1"}  # see engine.py

JOBS = {
    "tiny-plain": Job("answers"),
    "tiny": Job("answers", keep={}),
    "block-hashes": Job("answers", keep={}, options={"prefix_caching_hash_algo": "sha256_cbor"}),
    "async": Job("answers", keep={"load": "async"}),
    "layerwise": Job("answers", keep={"transfer_mode": "layerwise", "trace_path": "trace.json"}),
    "tight-async": Job("tight", keep={"load": "async", "transfer_mode": "layerwise"}, options=TIGHT),
    "tight": Job("tight", keep={}, options=TIGHT),
    "tight-plain": Job("tight", options=CHUNKED),
    "speculation": Job("speculation", keep={"store_generated": True}, options=NGRAM),
    "speculation-plain": Job("speculation"),
    "lora": Job("adapters", keep={}, options=LORA),
    "lora-plain": Job("adapters", options=LORA),
    "early-lora": Job("early_adapter", keep={}, options=LORA, disk="early-lora"),
    "early-lora-plain": Job("early_adapter", options=LORA),
    "early-lora-again": Job("early_adapter_again", keep={}, options=LORA, disk="early-lora", after="early-lora"),
    "ranks-lora": Job("early_adapter_on_ranks", keep={}, options={**LORA, **TP2}, env={**SEVERAL, **TWO_THREADS}),
    "ranks-lora-plain": Job("early_adapter_on_ranks", options={**LORA, **TP2}, env={**SEVERAL, **TWO_THREADS}),
    "early-lora-again-plain": Job("early_adapter_again", options=LORA, after="early-lora-plain"),
    "hybrid": Job("windows", "hybrid", keep={}),
    "hybrid-plain": Job("windows", "hybrid"),
    "tiny-across": Job("answers", keep=ACROSS, env=OUTERMOST),
    "hybrid-across": Job("windows", "hybrid", keep=ACROSS, env=OUTERMOST),
    "asked-in-vain": Job("few", keep=ACROSS),
    "outermost-by-layer": Job(
        "few", keep={"transfer_mode": "layerwise"}, env={**OUTERMOST, "VLLM_KV_CACHE_LAYOUT": "BLHNC"}
    ),
    "lfm2": Job("recurrent", "lfm2", keep={}, options=SMALL_STEPS, disk="states", shutdown=False),
    "lfm2-plain": Job("recurrent", "lfm2", options=SMALL_STEPS),
    "lfm2-restarted": Job("recurrent_again", "lfm2", keep={}, options=SMALL_STEPS, disk="states", after="lfm2"),
    "lfm2-parallel": Job("recurrent_again", "lfm2", keep={}, options=TP2, env={**SEVERAL, **TWO_THREADS}),
    "lfm2-parallel-plain": Job("recurrent_again", "lfm2", options=TP2, env={**SEVERAL, **TWO_THREADS}),
    "qwen3next": Job("recurrent", "qwen3next", keep={"verify_pool": "always"}, options=BF16),
    "qwen3next-plain": Job("recurrent", "qwen3next", options=BF16),
    "smollm2": Job("text", "smollm2", keep={"pool_size": "256 MiB"}),
    "smollm2-plain": Job("text", "smollm2"),
    "bf16": Job("one_prompt", "tinyb", keep={}, options=BF16, store="sharing"),
    "bf16-plain": Job("one_prompt", "tinyb", options=BF16),
    "fp8": Job("one_prompt", "tinyb", keep={}, options=FP8, cpu_flag="avx512f"),
    "fp8-plain": Job("one_prompt", "tinyb", options=FP8, cpu_flag="avx512f"),
    "processes": Job("one_prompt", keep={}, env=SEVERAL, store="sharing"),
    "joined": Job("restarted", keep={}, env=SEVERAL, store="sharing", after="processes"),
    "joined-plain": Job("restarted", env=SEVERAL),
    "processes-plain": Job("one_prompt", env=SEVERAL),
    "parallel": Job("one_prompt", keep={}, options=TP2, env={**SEVERAL, **TWO_THREADS}, store="parallel"),
    "parallel-plain": Job("one_prompt", options=TP2, env={**SEVERAL, **TWO_THREADS}),
    "disk": Job("one_prompt", keep={}, disk="kept", shutdown=False),
    "early-disk": Job("prefixes", keep={}, disk="for-early", shutdown=False),
    "early": Job("prefixes", keep=EARLY, disk="for-early", after="early-disk"),
    "early-plain": Job("prefixes"),
    "restarted": Job("restarted", keep={}, disk="kept", after="disk"),
    "restarted-plain": Job("restarted"),
    "slept": Job("slept", keep={}, disk="for-sleep", shutdown=False),
    "slept-plain": Job("slept"),
    "slept-restarted": Job("woken", keep={}, disk="for-sleep", after="slept"),
    "slept-restarted-plain": Job("woken"),
    "small-pool": Job("small_pool", keep={"pool_size": "768 KiB"}, shutdown=False),
    "small-pool-plain": Job("small_pool"),
}
"""Every engine of these tests but those whose weights are replaced; each `-plain` one is a reference."""
KEPT = tuple(name for name in JOBS if not name.endswith("-plain"))


@dataclass
class Runs:
    """Runs engines, one at a time, and remembers what they found."""

    folder: Path
    shared: Callable[[str], SharedStore]
    done: dict[str, Facts] = field(default_factory=dict)

    def __call__(self, name: str) -> Facts:
        """The facts of one of JOBS."""
        if name not in self.done:
            job = JOBS[name]
            if job.cpu_flag not in Path("/proc/cpuinfo").read_text():
                pytest.skip(f"vLLM runs the engine {name} only on a CPU with {job.cpu_flag}")
            if "adapter" in job.scenario:
                self._make_adapters()
            if job.after:
                self(job.after)
            self.run(name, job, MODELS / job.model)
        return self.done[name]

    def pair(self, name: str) -> tuple[Facts, Facts]:
        """A run with kvkeep and its reference."""
        return self(name), self(f"{name}-plain")

    def run(self, name: str, job: Job, model: Path) -> Facts:
        """Runs an engine to its end; its output is in the run's folder."""
        folder = self.folder / name
        folder.mkdir()
        store = self.shared(job.store) if job.store else None
        keep = None if job.keep is None else {**PATIENT, **job.keep}
        if keep is not None and job.disk:
            keep |= {"disk_path": str(self.folder / job.disk), "disk_size": "64 MiB", "disk_min_free": "1 MiB"}
        if keep is not None and "trace_path" in keep:
            keep["trace_path"] = str(folder / str(keep["trace_path"]))
        if keep is not None and store is not None:
            keep["store"] = f"unix:{store.path}"
        facts, log = folder / "facts.json", folder / "log"
        parts = {"scenario": job.scenario, "model": str(model), "keep": keep, "options": job.options}
        rest = {"folder": str(self.folder), "facts": str(facts), "shutdown": job.shutdown}
        (folder / "job.json").write_text(json.dumps({**parts, **rest}))
        with log.open("w") as out:
            subprocess.run(
                [sys.executable, str(RUN), str(folder / "job.json")],
                env={**os.environ, **environment(folder), **job.env},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            )
        assert facts.exists(), f"the engine run {name} failed ({log}):\n{log.read_text(errors='replace')[-4000:]}"
        found = json.loads(facts.read_text())
        stats = store.stats() if store is not None else found.get("store", {})
        self.done[name] = Facts(found, folder, job, stats)
        return self.done[name]

    def _make_adapters(self) -> None:
        for seed in (1, 2, 3):
            if (self.folder / f"lora-{seed}").exists():
                continue
            make_models("lora", str(self.folder / f"lora-{seed}"), "--base", "tiny", "--seed", str(seed))


def make_models(*arguments: str) -> None:
    """scripts/models.py in a process of its own: it imports what this one should not."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / "models.py"), *arguments], check=True, timeout=LIMIT_S)


def environment(folder: Path) -> dict[str, str]:
    """One process, one thread, no network, nothing compiled; temporary files in the run's own folder."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles what makes logprobs on first use: 16 s
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "VLLM_CACHE_ROOT": str(ROOT / "build" / "vllm-cache"),  # what it found out of a model's class takes 12 s
    }


@pytest.fixture(scope="session")
def shared_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], SharedStore]]:
    """Makes shared stores by name."""
    stores: dict[str, SharedStore] = {}

    def store(name: str) -> SharedStore:
        if name not in stores:
            folder = tmp_path_factory.mktemp(name)
            folder.chmod(0o700)
            command = [
                sys.executable,
                "-m",
                "kvkeep.store",
                f"--socket={folder / 'store'}",
                f"--options={Config(pool_size=64 << 20).json()}",
            ]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            assert "pool of" in process.stderr.readline()  # it listens by now
            stores[name] = SharedStore(folder, process)
        return stores[name]

    yield store
    for one in stores.values():
        one.process.terminate()
        one.process.communicate(timeout=10)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_stores: Callable[[str], SharedStore]) -> Runs:
    """The session's engine runs."""
    make_models(*USED_MODELS)
    return Runs(tmp_path_factory.mktemp("engines"), shared_stores)


@pytest.fixture(scope="session")
def script_run(runs: Runs) -> Callable[..., dict[str, Any]]:
    """Runs a script of `engines/` and gives its facts."""

    def run(script: str, kind: str, ranks: int, model: str = "tiny") -> dict[str, Any]:
        command = [sys.executable, str(RUN.with_name(script)), str(MODELS / model), kind, str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
        assert lines, done.stdout[-3000:] + done.stderr[-3000:]
        facts: dict[str, Any] = json.loads(lines[-1].removeprefix("FACTS "))
        return facts

    return run


@pytest.fixture(scope="session")
def job() -> type[Job]:
    """For engines that a test starts in its own way."""
    return Job


@pytest.fixture(scope="session")
def model_folder(runs: Runs) -> Callable[[str], Path]:
    """The folder of a model that exists."""
    return lambda name: MODELS / name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kept` is each engine run with kvkeep in turn."""
    if "kept" in metafunc.fixturenames:
        metafunc.parametrize("kept", KEPT, indirect=True)


@pytest.fixture
def kept(request: pytest.FixtureRequest, runs: Runs) -> Facts:
    """The facts of the engine run of this name."""
    return runs(request.param)
