"""The main job: a real model, served by vLLM, answers questions about a long text without and with kvkeep.

`make demo` runs it. Two servers run side by side with the same thread binding, one without and one with kvkeep;
each question goes to the first, then to the second twice: with nothing stored (cold), and with vLLM's own prefix cache
emptied but kvkeep's content kept (warm). Writes demo.json and demo.png into the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ask import Answer, AskError, Client, Counters
from report import About, Asked, table, write_chart, write_json
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from server import HOST, DemoError, Server, ServerOptions, last_line

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build" / "models" / "smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
TEXT = ROOT / "demo" / "text.txt"
LOGS = ROOT / "build" / "demo"
QUESTIONS = (
    "What was written on the label of the bottle that Alice found?",
    "What words were marked in currants on the very small cake?",
    "What did the White Rabbit drop when he ran away into the darkness?",
)
MAX_TOKENS = 24
CONNECTOR = {
    "kv_connector": "KVKeepConnector",
    "kv_connector_module_path": "kvkeep.engine.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {},
}
POOL_GAUGE = "kvkeep_pool_used_nbytes"
COMPARED_WITH = "the same question's cold run on the server without kvkeep (float32, greedy)"


class Steps:
    """The progress bar: `now` says what is being done, `done` moves it on, `line` prints above it."""

    def __init__(self, progress: Progress, n_steps: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("starting", total=n_steps)

    def now(self, text: str) -> None:
        """Shows what is being done."""
        self._progress.update(self._task, description=text)

    def done(self) -> None:
        """Counts one step as done."""
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        self._progress.console.print(text, soft_wrap=True)


@dataclass(frozen=True)
class Pair:
    """Clients of the two servers: `plain` runs vLLM alone, `kept` runs it with the connector."""

    plain: Client
    kept: Client
    steps: Steps

    def warm_up(self) -> None:
        """One short other question each, so that no first use of code or memory is timed."""
        for client in (self.plain, self.kept):
            self.steps.now("one short question to each server, not timed")
            client.ask("Say hello. " * 120, 2)
            self.steps.done()

    def ask(self, question: str) -> Asked:
        """Asks one question three times: without kvkeep, cold and warm."""
        text = f"Read this text.\n\n{TEXT.read_text()}\n\nA question about the text: {question} Answer in one sentence."
        self.plain.reset(stored_too=False)
        without = self._timed(self.plain, text, "without kvkeep: every token is computed")
        self.kept.reset(stored_too=True)
        cold = self._timed(self.kept, text, "with kvkeep, cold: every token is computed, then stored")
        self.kept.reset(stored_too=False)
        before = self.kept.counters()
        warm = self._timed(self.kept, text, "with kvkeep, warm: vLLM's own cache is empty, stored tokens come back")
        after = self.kept.counters()
        return Asked(question, without, cold, warm, after.reused_since(before), pool_used_nbytes(after))

    def _timed(self, client: Client, text: str, doing: str) -> Answer:
        self.steps.now(doing)
        answer = client.ask(text, MAX_TOKENS)
        self.steps.done()
        return answer


def pool_used_nbytes(counters: Counters) -> int | None:
    """Bytes that kvkeep's pool holds, or None where the server does not tell."""
    used = counters.totals.get(POOL_GAUGE)
    return None if used is None else int(used)


def usable_cpus(most: int = 8) -> str:
    """The processors that both servers' compute threads are bound to, as vLLM wants them: "0,1"."""
    return ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:most])


def machine_name() -> str:
    """The processor's name and how many processors the demo may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} processors"


def both_options(connector: dict[str, object]) -> tuple[ServerOptions, ServerOptions]:
    """The two servers: equal in everything but the connector."""
    config = ("--kv-transfer-config", json.dumps(connector, separators=(",", ":")))
    return (
        ServerOptions("without kvkeep", MODEL, LOGS / "without.log", usable_cpus()),
        ServerOptions("with kvkeep", MODEL, LOGS / "with.log", usable_cpus(), config),
    )


def start_both(stack: ExitStack, options: Sequence[ServerOptions], steps: Steps) -> list[Server]:
    """Starts the servers at once and waits for both; `stack` stops them whatever happens."""
    servers = []
    for each in options:
        servers.append(Server(each))
        stack.callback(servers[-1].stop)
    for server in servers:
        name, log = server.options.name, server.options.log
        for waited_s in server.until_ready():
            steps.now(f"starting the server {name}, {waited_s:.0f} s: {last_line(log, 60)}")
        steps.line(f"the server {name} is ready; its log: {log}")
        steps.done()
    return servers


def measure(options: Sequence[ServerOptions], console: Console) -> list[Asked]:
    """Runs both servers and asks every question, showing each result as it comes. Raises DemoError."""
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress, ExitStack() as stack:
        steps = Steps(progress, 4 + 3 * len(QUESTIONS))
        servers = start_both(stack, options, steps)
        plain, kept = (Client(HOST, server.port, MODEL.name) for server in servers)
        pair, asked = Pair(plain, kept, steps), []
        try:
            pair.warm_up()
            for question in QUESTIONS:
                asked.append(pair.ask(question))
                times = ", ".join(f"{kind} {ttft_s:.2f} s" for kind, ttft_s in asked[-1].ttft_s().items())
                steps.line(f"[bold]{question}[/]\n  {escape(asked[-1].warm.text)}\n  first token: {times}")
        except AskError as error:
            for server in servers:
                server.check_alive()
            raise servers[-1].failure(f"did not answer as it should: {error}") from error
        steps.now("stopping the servers")
    return asked


def show(about: About, asked: Sequence[Asked], console: Console) -> list[str]:
    """Prints the table, writes the files, and returns what is wrong with the result (nothing, one hopes)."""
    json_path, chart_path = ROOT / "demo.json", ROOT / "demo.png"
    write_json(json_path, about, asked)
    write_chart(chart_path, about, asked)
    console.print(table(about, asked))
    console.print(f"The answers are compared with {about.answers_compared_with}.", soft_wrap=True)
    console.print(f"The same as JSON:  {json_path}\nand as a chart:    {chart_path}", soft_wrap=True)
    wrong = [f"The answers differ: {a.question}" for a in asked if not a.answers_identical]
    return wrong + [f"Nothing was reused: {a.question}" for a in asked if not a.warm.cached_tokens]


def main() -> int:
    """Runs the demo; 0 if every answer was identical and used stored tokens."""
    parser = argparse.ArgumentParser(description="Ask a real model about a long text, without and with kvkeep.")
    parser.add_argument("--connector", type=json.loads, default=CONNECTOR, help="another --kv-transfer-config (JSON)")
    options = both_options(parser.parse_args().connector)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly exit, so that the servers are stopped
    console = Console(width=None if sys.stdout.isatty() else 150)
    if not MODEL.is_dir():
        console.print("Making the model, once (about a minute).")
        subprocess.run([sys.executable, str(ROOT / "scripts" / "models.py"), MODEL.name], check=True)
    try:
        asked = measure(options, console)
    except DemoError as error:
        console.print(f"[bold red]The demo failed.[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    about = About(
        model=MODEL_NAME,
        prompt_tokens=max(a.warm.prompt_tokens for a in asked),
        dtype="float32",
        answers_compared_with=COMPARED_WITH,
        machine=machine_name(),
        commands={each.name: shlex.join(["python", *each.command(8000)[1:]]) for each in options},
    )
    wrong = show(about, asked, console)
    for line in wrong:
        console.print(f"[bold red]{line}[/]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
