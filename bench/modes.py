"""kvkeep's ways to copy beside each other in real vLLM: bulk, layer by layer, beside the steps; A B A B, one run.

Rows: a cold prompt (stores), a stored prefix with new tokens behind it (loads under a prefill), how long a running
request waits while another one's prefix is loaded, and a prefix that is on disk only, page cache dropped. The
yardstick is bulk; with `none` among the ways, what cannot be a hit is also beside vLLM without kvkeep. Takes about 20
minutes; dropping the page cache needs root. Knows nothing about peers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from restart import DISK, drop_page_cache, settle
from ttft import BUILD, KVKEEP, PLAIN, Engine, engine

from kvkeep.bench.rows import Case, Row, say, show, write

WAYS: dict[str, dict[str, str | bool]] = {
    "bulk": {"load": "sync", "transfer_mode": "bulk"},
    "layerwise": {"load": "sync", "transfer_mode": "layerwise"},
    "early": {"load": "sync", "transfer_mode": "layerwise", "early_loads": True},
    "async": {"load": "async", "transfer_mode": "bulk"},
    "auto": {},
    "none": {},
}
MORE = 255  # new tokens behind a prefix on disk: less than a chunk, so that nothing new is kept
POOL_MIB = 264  # two prompts of 8k tokens, or three of 4k, take turns: each finds the others in its place


def cold(engines: dict[str, Engine], tokens: int, seeds: range) -> dict[str, list[float]]:
    """Fresh prompts, the same for all; the order turns from prompt to prompt."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for seed in seeds:
        for name in turned(engines, seed):
            found[name].append(engines[name].ask(tokens, seed, range(1)).ttft_s)
        say(f"cold {tokens} {seed}: " + told(found))
    return found


def extended(engines: dict[str, Engine], tokens: int, more: int, seeds: range) -> dict[str, list[float]]:
    """Stored prompts that go on: `tokens` are loaded, `more` are computed."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for number, seed in enumerate(seeds):
        for name in turned(engines, seed):
            engines[name].tell(reset=True)
            found[name].append(engines[name].ask(tokens + more + number, seed, range(tokens, tokens + 256)).ttft_s)
        say(f"extended {tokens}+{more} {seed}: " + told(found))
    return found


def stalls(engines: dict[str, Engine], tokens: int, seed: int, runs: int) -> tuple[dict[str, list[float]], ...]:
    """The longest step of a running request while a stored prompt is loaded, and that one's time to first token."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    first: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(runs + 1):
        for name in turned(engines, number):
            engines[name].tell(reset=True)
            answer = engines[name].tell(stall=tokens, seed=seed)
            if answer["cached"] < tokens - 1:
                say(f"  {name}: {answer['cached']} of {tokens} tokens were cached")
            if number:
                found[name].append(answer["stall_s"])
                first[name].append(answer["ttft_s"])
    say(f"stall {tokens}: " + told(found))
    return found, first


def on_disk(options: argparse.Namespace, sizes: dict[int, int]) -> dict[str, dict[str, list[float]]]:
    """Prompts that only the disk has: `sizes` says how many prompts of how many tokens take turns.

    They are computed once; each way starts on a copy of that disk.
    """
    shutil.rmtree(DISK, ignore_errors=True)
    settings = {"pool_size": f"{POOL_MIB} MiB", "max_pinned_share": 1.0, "deadline_s": 10.0, "disk_size": "4 GiB"}
    with ExitStack() as stack:
        one = begun(stack, options, "source", {**settings, "disk_path": str(DISK / "source")})
        one.answer()
        for tokens, count in sizes.items():
            for seed in range(count):
                say(f"storing {tokens} {seed}: {one.ask(tokens, tokens + seed, range(1)).ttft_s:.2f} s")
                settle()  # the next one takes its place in the pool
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        engines = {}
        for name in [name for name in options.ways if name != "none"]:
            shutil.copytree(DISK / "source", DISK / name)
            path = {"disk_path": str(DISK / name)}
            engines[name] = begun(stack, options, name, {**settings, **WAYS[name], **path})
            engines[name].answer()
        for (tokens, count), more in product(sizes.items(), (0, MORE)):
            case = found[f"disk-{tokens}+{more}" if more else f"disk-{tokens}"] = {name: [] for name in engines}
            for number in range(options.runs + count):
                for name in turned(engines, number):
                    engines[name].tell(reset=True)
                    drop_page_cache()
                    seed, hit = tokens + number % count, range(tokens - 1, tokens + 1)
                    took = engines[name].ask(tokens + more, seed, hit).ttft_s
                    if number >= count:
                        case[name].append(took)
            say(f"disk {tokens}+{more}: " + told(case))
    shutil.rmtree(DISK, ignore_errors=True)
    return found


def begun(stack: ExitStack, options: argparse.Namespace, name: str, settings: dict[str, Any] | None) -> Engine:
    """An engine that is being started, without kvkeep if there are no settings."""
    say(f"starting {name}: {json.dumps(settings)}")
    transfer = {**KVKEEP, "kv_connector_extra_config": settings} if settings is not None else None
    return stack.enter_context(engine(f"modes-{name}", Path(sys.executable), options, transfer))


def turned(engines: dict[str, Engine], number: int) -> list[str]:
    names = list(engines)
    return names[number % len(names) :] + names[: number % len(names)]


def told(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {median(times):.4f}" for name, times in found.items())


def rows(engines: dict[str, Engine], options: argparse.Namespace) -> list[Row]:
    """Each way beside bulk, and beside no cache where nothing can be a hit."""
    tokens, seeds = options.tokens, range(options.pairs)
    measured = {f"cold-{tokens}": cold(engines, tokens, seeds)}
    if "cold" in options.cases:
        measured["cold-1000"] = cold(engines, 1000, range(1000, 1000 + options.runs))
        measured["cold-100"] = cold(engines, 100, range(2000, 2000 + 2 * options.runs))
    keeping = {name: one for name, one in engines.items() if name != "none"}
    if "extended" in options.cases:
        measured[f"extend-{tokens}+1024"] = extended(keeping, tokens, 1024, seeds)
        measured[f"extend-{tokens}+128"] = extended(keeping, tokens, 128, seeds)
    if "stalls" in options.cases:
        held, first = stalls(keeping, tokens, 0, options.runs)
        measured |= {f"running-step-{tokens}": held, f"ttft-beside-a-running-one-{tokens}": first}
    return [one for case, found in measured.items() for one in compared(case, found)]


def compared(case: str, found: dict[str, list[float]]) -> list[Row]:
    """The rows of one case: bulk is the yardstick of the other ways, no cache of all that keep one."""
    made = []
    for name in [name for name in found if name != "none"]:
        if "none" in found:
            made.append(Case(f"{case}-{name}-vs-none", "s", PLAIN, goal="<= 1.05").row(found[name], found["none"]))
        if name != "bulk" and "bulk" in found:
            goal = "<= 0.9" if case.startswith("disk") else "<= 1.05"
            made.append(Case(f"{case}-{name}", "s", "kvkeep, bulk and sync", goal=goal).row(found[name], found["bulk"]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILD / "models" / "bench")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    cases = ["cold", "extended", "stalls", "disk"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made: list[Row] = []
    if set(options.cases) != {"disk"}:
        with ExitStack() as stack:
            engines = {}
            for name in options.ways:
                settings = {"pool_size": "1 GiB", **WAYS[name]} if name != "none" else None
                engines[name] = begun(stack, options, name, settings)
                engines[name].answer()
            made += rows(engines, options)
    if "disk" in options.cases:
        for case, found in on_disk(options, {4096: 3, 8192: 2}).items():
            made += compared(case, found)
    write(made, options.json)
    show(made, f"ways to copy, {options.dtype}")


if __name__ == "__main__":
    main()
