"""Time to first token in real vLLM: cold, from its own prefix cache, from kvkeep, from LMCache 0.5.6; A B A B, one run.

Three engines live at the same time (plain, kvkeep, lmcache) and are asked in turn, each bound to the same core. Without
the environment of `scripts/peers.sh` the LMCache rows are left out. Takes about 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TextIO

from kvkeep.bench.rows import Case, Row, say, show, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
POOL_GIB = 2
BLOCK_TOKENS = 128  # vLLM's on a CPU
PLAIN = "vLLM without a connector"
END_LIMIT_S = 20.0
START_LIMIT_S = 120.0
SETTLE_S = 1.0  # what a peer stores beside its steps is there by then
WARM_GOALS = {4096: "<= 0.8", 8192: "<= 0.9"}
KVKEEP = {
    "kv_connector": "KVKeepConnector",
    "kv_connector_module_path": "kvkeep.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"pool_size": f"{POOL_GIB} GiB"},
}


class Asked(NamedTuple):
    """What one question took: seconds to the first token, CPU seconds of all the engine's processes."""

    ttft_s: float
    cpu_s: float


class Engine:
    """A running `ttft_engine.py`: one question at a time."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def answer(self) -> dict[str, Any]:
        """The next answer; SystemExit if the engine is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the engine {self.name!r} ended: see {BUILD / 'bench'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **command: Any) -> dict[str, Any]:
        """The answer to one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def ask(self, tokens: int, seed: int, cached: range) -> Asked:
        """One question; says so if not as many tokens as `cached` came from a cache."""
        answer = self.tell(ask=tokens, seed=seed)
        if answer["cached"] not in cached:
            say(f"  {self.name}: {answer['cached']} of {tokens} tokens were cached, expected {cached}")
        return Asked(answer["ttft_s"], answer["cpu_s"])

    def ask_again(self, tokens: int, seed: int) -> Asked:
        """The same after vLLM's own cache was emptied: all but one token must come from the connector."""
        if not self.tell(reset=True)["reset"]:
            say(f"  {self.name}: vLLM did not empty its prefix cache")
        return self.ask(tokens, seed, range(tokens - 1, tokens + 1))


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process of ours, at first kindly."""
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def engine(name: str, python: Path, options: argparse.Namespace, transfer: dict[str, Any] | None) -> Iterator[Engine]:
    """An engine that is being started; it is ready once it has answered for the first time."""
    command = [str(python), str(HERE / "ttft_engine.py"), f"--model={options.model}", f"--dtype={options.dtype}"]
    if transfer is not None:
        command.append(f"--transfer={json.dumps(transfer)}")
    with log_file(name) as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield Engine(name, process)
        finally:
            end(process)


def log_file(name: str) -> TextIO:
    """Where a process's own words go."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    return (BUILD / "bench" / f"{name}.log").open("w")


@contextmanager
def lmcache_server(venv: Path, more: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """LMCache's server on loopback, `more` ends its command line; gives the connector's configuration."""
    port, http_port = free_ports(2)
    command = [
        *(str(venv / "bin" / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--http-host", "127.0.0.1", "--http-port", str(http_port), "--l1-size-gb", str(POOL_GIB)),
        *("--eviction-policy", "LRU", "--chunk-size", "256", "--disable-observability"),
        *("--supported-transfer-mode", "auto", "--shm-name", f"kvkeep-bench-{port}"),
        *more,
    ]
    with log_file("lmcache-server") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        try:
            wait_for_port(http_port, process)
            yield {
                "kv_connector": "LMCacheMPConnector",
                "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
            }
        finally:
            end(process)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    """Returns when something listens at `port`; SystemExit if the process ends before."""
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    sys.exit(f"LMCache's server did not start: see {BUILD / 'bench' / 'lmcache-server.log'}")


def cold_runs(engines: dict[str, Engine], tokens: int, pairs: int) -> dict[str, list[Asked]]:
    """Fresh prompts, the same for both engines of a pair, which swap their turns from pair to pair."""
    asked: dict[str, list[Asked]] = {name: [] for name in engines if name != "lmcache"}
    for number in range(pairs):
        for name in sorted(asked, reverse=number % 2 == 0):
            asked[name].append(engines[name].ask(tokens, tokens + number, range(1)))
        last = (f"{name} {all_[-1].ttft_s:.3f} s" for name, all_ in asked.items())
        say(f"{tokens} cold {number + 1}/{pairs}: {', '.join(last)}")
    if "lmcache" in engines:
        engines["lmcache"].ask(tokens, tokens + pairs - 1, range(1))
        time.sleep(SETTLE_S)
    return asked


def warm_runs(engines: dict[str, Engine], tokens: int, seed: int, runs: int) -> dict[str, list[Asked]]:
    """The last prompt again, from kvkeep, LMCache and vLLM's own prefix cache; the first round is not counted."""
    asked: dict[str, list[Asked]] = {name: [] for name in engines}
    for _ in range(runs + 1):
        for name, one in engines.items():
            if name == "plain":
                asked[name].append(one.ask(tokens, seed, range(tokens - BLOCK_TOKENS, tokens)))
            else:
                asked[name].append(one.ask_again(tokens, seed))
    medians = (f"{name} {median(one.ttft_s for one in all_[1:]):.4f} s" for name, all_ in asked.items())
    say(f"{tokens} warm: {', '.join(medians)}")
    return {name: all_[1:] for name, all_ in asked.items()}


def length_rows(engines: dict[str, Engine], tokens: int, pairs: int, runs: int) -> list[Row]:
    """All rows of one prompt length."""
    case = f"ttft-{tokens // 1024}k"
    cold = cold_runs(engines, tokens, pairs)
    warm = warm_runs(engines, tokens, tokens + pairs - 1, runs)
    goal = "<= 1.02" if tokens == 4096 else ""
    made = []
    if "plain" in engines:
        made = [
            times(Case(f"{case}-cold-vs-plain", "s", PLAIN, goal=goal), cold["kvkeep"], cold["plain"]),
            cpu_times(Case(f"{case}-cold-cpu-vs-plain", "CPU s", PLAIN), cold["kvkeep"], cold["plain"]),
            times(Case(f"{case}-warm-vs-cold", "s", f"{PLAIN}, cold"), warm["kvkeep"], cold["plain"]),
            times(Case(f"{case}-warm-vs-prefix-hit", "s", "vLLM's own prefix hit"), warm["kvkeep"], warm["plain"]),
        ]
    if "lmcache" in engines:
        versus = Case(f"{case}-warm-vs-lmcache", "s", "LMCache 0.5.6, warm", goal=WARM_GOALS.get(tokens, ""))
        made.append(times(versus, warm["kvkeep"], warm["lmcache"]))
    return made


def times(case: Case, ours: list[Asked], theirs: list[Asked]) -> Row:
    """The row of the times to first token."""
    return case.row([one.ttft_s for one in ours], [one.ttft_s for one in theirs])


def cpu_times(case: Case, ours: list[Asked], theirs: list[Asked]) -> Row:
    """The row of the CPU seconds of all processes of an engine: what a busy machine disturbs less."""
    return case.row([one.cpu_s for one in ours], [one.cpu_s for one in theirs])


def started(stack: ExitStack, options: argparse.Namespace) -> dict[str, Engine]:
    """The engines, all ready."""
    ours = Path(sys.executable)
    wanted: list[tuple[str, Path, dict[str, Any] | None]] = [("kvkeep", ours, KVKEEP)]
    if "plain" in options.beside:
        wanted.insert(0, ("plain", ours, None))
    peer = options.peer_venv / "bin" / "python"
    if "lmcache" not in options.beside:
        say("LMCache is left out")
    elif peer.exists():
        wanted.append(("lmcache", peer, stack.enter_context(lmcache_server(options.peer_venv))))
    else:
        say(f"no LMCache at {options.peer_venv}: its rows are left out (bash scripts/peers.sh makes it)")
    engines = {}
    for name, python, transfer in wanted:
        say(f"starting {name} (about 30 s)")
        engines[name] = stack.enter_context(engine(name, python, options, transfer))
        engines[name].answer()  # one after the other: they share two cores
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILD / "models" / "bench")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--beside", nargs="+", choices=["plain", "lmcache"], default=["plain", "lmcache"])
    parser.add_argument("--peer-venv", type=Path, default=BUILD / "peer-venv")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--pairs", type=int, default=5, help="cold prompts a length")
    parser.add_argument("--runs", type=int, default=11, help="warm questions a length")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.model.exists():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "models.py"), "bench"], check=True)
    with ExitStack() as stack:
        engines = started(stack, options)
        rows: list[Row] = []
        for tokens in options.tokens:
            rows += length_rows(engines, tokens, options.pairs, options.runs)
            write(rows, options.json)  # what is measured is kept, whatever follows
    show(rows, f"time to first token, {options.dtype}")


if __name__ == "__main__":
    main()
