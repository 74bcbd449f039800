"""kvkeep's ways to copy beside each other in real vLLM: bulk, layer by layer, beside the steps; A B A B, one run.

Rows: a cold prompt (stores), a stored prefix with as many new tokens behind it (loads under a prefill), and how long a
running request waits while another one's prefix is loaded. Takes about 10 minutes; knows nothing about peers.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from ttft import BUILD, KVKEEP, Engine, engine

from kvkeep.cli.rows import Case, Row, say, show, write

WAYS: dict[str, dict[str, str]] = {
    "bulk": {"load": "sync", "transfer_mode": "bulk"},
    "layerwise": {"load": "sync", "transfer_mode": "layerwise"},
    "async": {"load": "async", "transfer_mode": "bulk"},
    "auto": {},
}


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


def turned(engines: dict[str, Engine], number: int) -> list[str]:
    names = list(engines)
    return names[number % len(names) :] + names[: number % len(names)]


def told(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {median(times):.4f}" for name, times in found.items())


def rows(engines: dict[str, Engine], options: argparse.Namespace) -> list[Row]:
    """One row for each way but bulk, which is the yardstick."""
    tokens, made = options.tokens, []
    seeds = range(options.pairs)
    measured = {f"cold-{tokens}": cold(engines, tokens, seeds)}
    if "extended" in options.cases:
        measured[f"extend-{tokens}+1024"] = extended(engines, tokens, 1024, seeds)
        measured[f"extend-{tokens}+128"] = extended(engines, tokens, 128, seeds)
    if "stalls" in options.cases:
        held, first = stalls(engines, tokens, 0, options.runs)
        measured |= {f"running-step-{tokens}": held, f"ttft-beside-a-running-one-{tokens}": first}
    for case, found in measured.items():
        for name in [name for name in engines if name != "bulk"]:
            made.append(Case(f"{case}-{name}", "s", "kvkeep, bulk and sync").row(found[name], found["bulk"]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILD / "models" / "bench")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--cases", nargs="+", choices=["extended", "stalls"], default=["extended", "stalls"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings: dict[str, Any] = KVKEEP["kv_connector_extra_config"]
    with ExitStack() as stack:
        engines = {}
        for name in options.ways:
            transfer = {**KVKEEP, "kv_connector_extra_config": {**settings, **WAYS[name], "pool_size": "1 GiB"}}
            say(f"starting {name}: {json.dumps(WAYS[name])}")
            engines[name] = stack.enter_context(engine(f"modes-{name}", Path(sys.executable), options, transfer))
            engines[name].answer()
        made = rows(engines, options)
    write(made, options.json)
    show(made, f"ways to copy, {options.dtype}")


if __name__ == "__main__":
    main()
