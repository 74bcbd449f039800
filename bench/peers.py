"""The parts of kvkeep beside LMCache's, in turn: keys, allocators, eviction, lookup, the engine's verbs and copies.

`OMP_NUM_THREADS=1 python bench/peers.py --scripts FOLDER [--only NAME ...] [--rounds N] [--json FILE]`. FOLDER holds
the micro-benchmarks of LMCache (`bench_a_tokens.py` and so on, each of which appends its rows to $LMBENCH_OUT); they
run in the environment of `scripts/peers.sh`. One round is all of a peer's script, then ours; a value of a round is the
median of its runs. A file keeps its rows of the sides that are not named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvkeep.bench.rows import Case, Row, say, show, write

ROOT = Path(__file__).resolve().parents[1]
PEER = "LMCache"
LIMIT_S = 600.0
RUNS = 7  # a round
# transformers, which LMCache imports, does not survive that one of the scripts replaces torch.cuda.Stream before
START = """import runpy, sys, transformers.generation.utils
runpy.run_path(sys.argv[1], run_name="__main__")"""


@dataclass(frozen=True)
class Pair:
    """One case of ours, and what LMCache calls its own."""

    ours: str
    theirs: str
    unit: str = "us"

    def case(self) -> Case:
        """How the two are shown."""
        return Case(self.ours, self.unit, f"{PEER}: {self.theirs}", "lower" if self.unit == "us" else "higher")

    def peer_value(self, row: dict[str, float]) -> float:
        """Its median in our unit."""
        return row["us_median"] if self.unit == "us" else row["median"] / (1e6 if self.unit == "Mtok/s" else 1)


@dataclass(frozen=True)
class Side:
    """What runs: LMCache's script and the settings that make it short, our groups, and what is compared."""

    script: str
    settings: dict[str, str]
    groups: tuple[str, ...]
    pairs: tuple[Pair, ...]


DATABASE = "ChunkedTokenDatabase.process_tokens sha256_cbor {} n=131072"
BLOCKS = "flashattn[2,NB,BS,H,D] random slots"
SIDES = {
    "keys": Side(
        "bench_a_tokens.py",
        {},
        ("keys",),
        (
            Pair("keys-array", DATABASE.format("tensor"), "Mtok/s"),
            Pair("keys-list", DATABASE.format("list"), "Mtok/s"),
        ),
    ),
    "alloc": Side(
        "bench_b_alloc.py",
        {},
        ("alloc",),
        (
            Pair("freelist", "TensorMemoryAllocator 256KiB alloc+free pair, empty arena"),
            Pair("freelist-holes", "TensorMemoryAllocator 256KiB churn (free 1 random+alloc 1) with 4096 equal holes"),
            Pair("freelist-fail", "TensorMemoryAllocator 512KiB allocate that must fail, 4096 holes of 256KiB"),
        ),
    ),
    "index": Side(
        "bench_c_cpu.py",
        {"POL": "LRU"},
        ("policy", "index"),
        (
            Pair("evict-pinned", "LRU n=100000 allocate(evict 1)+put, 50000 oldest pinned"),
            Pair("lookup-chunk", "LRU n=100000 contains(pin)+touch_cache+unpin"),
            Pair("reserve-commit-chunk", "LRU n=100000 allocate(evict 1)+put at capacity"),
        ),
    ),
    "engine": Side(
        "bench_e_engine.py",
        {},
        ("engine",),
        (
            Pair("store-chunk", "bulk store, MockGPUConnector (no copy): pure overhead, list tokens"),
            Pair("retrieve-chunk", "bulk retrieve, MockGPUConnector (no copy): pure overhead"),
            Pair("engine-lookup-chunk", "lookup hit pin + lookup_unpin, list tokens"),
            Pair("bulk-store", f"bulk store {BLOCKS} interm_buf=False", "GB/s"),
            Pair("bulk-retrieve", f"bulk retrieve {BLOCKS} interm_buf=False", "GB/s"),
            Pair("layerwise-store", "layerwise store flashattn random slots", "GB/s"),
            Pair("layerwise-retrieve", "layerwise retrieve flashattn random slots", "GB/s"),
        ),
    ),
}


def peer_rows(side: Side, python: Path, scripts: Path, folder: Path) -> dict[str, float]:
    """One run of LMCache's script: for each case of ours what it has for it."""
    out = folder / "peer.jsonl"
    out.unlink(missing_ok=True)
    settings = {"LMBENCH_OUT": str(out), "LMBENCH_REPS": str(RUNS), "OMP_NUM_THREADS": "1", **side.settings}
    environment = os.environ | settings | {"PYTHONPATH": str(scripts / "vllm_stub")}  # all that it needs of vLLM
    done = subprocess.run(
        [python, "-c", START, scripts / side.script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    rows = {row["case"]: row for row in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    missing = [pair.theirs for pair in side.pairs if pair.theirs not in rows]
    if missing:
        sys.exit(f"{side.script} measured no {missing} (status {done.returncode}):\n{done.stderr[-2000:]}")
    return {pair.ours: pair.peer_value(rows[pair.theirs]) for pair in side.pairs}


def our_rows(side: Side, folder: Path) -> dict[str, float]:
    """One run of `kvkeep bench`: the median of each case."""
    out = folder / "ours.json"
    command = [sys.executable, "-m", "kvkeep.cli.main", "bench", *side.groups, f"--runs={RUNS}", f"--json={out}"]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    return {row["case"]: row["median"] for row in json.loads(out.read_text())}


def compared(name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one side, in turn."""
    side, python = SIDES[name], options.peer_venv / "bin" / "python"
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="kvkeep-peers-") as folder:
        for number in range(options.rounds):
            say(f"{name}, round {number + 1} of {options.rounds}: {PEER} ...")
            theirs.append(peer_rows(side, python, options.scripts, Path(folder)))
            say(f"{name}, round {number + 1} of {options.rounds}: kvkeep ...")
            ours.append(our_rows(side, Path(folder)))
    return [
        pair.case().row([one[pair.ours] for one in ours], [one[pair.ours] for one in theirs]) for pair in side.pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scripts", type=Path, default=ROOT.parent / "shared" / "peers" / "lmcache_micro")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / "build" / "peer-venv")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.peer_venv / "bin" / "python").exists() or not options.scripts.is_dir():
        sys.exit(
            f"needs LMCache at {options.peer_venv} (bash scripts/peers.sh) and its benchmarks at {options.scripts}"
        )
    made = [row for name in options.only for row in compared(name, options)]
    show(made, f"kvkeep beside {PEER}")
    write(made, options.json, keeps=True)


if __name__ == "__main__":
    main()
