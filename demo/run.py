"""The main job: a real model, served by vLLM, answers questions about a long text without and with kvkeep.

`make demo` runs it. Two servers run side by side with the same thread binding, one without and one with kvkeep;
each question goes to the first, then to the second twice: with nothing stored (cold; each question has its own salt, so
that it reuses nothing of the others), and with vLLM's own prefix cache emptied (warm). Then the second server restarts,
and answers each question once more. Writes demo.json and demo.png into the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
DISK = LOGS / "disk"
QUESTIONS = (
    "What was written on the label of the bottle that Alice found?",
    "What words were marked in currants on the very small cake?",
    "What did the White Rabbit drop when he ran away into the darkness?",
)
MAX_TOKENS = 24
CONNECTOR = {
    "kv_connector": "KVKeepConnector",
    "kv_connector_module_path": "kvkeep.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"disk_path": str(DISK), "disk_size": "2 GiB", "local_reset": "keep"},
}
POOL_GAUGE = "kvkeep_pool_used_nbytes"
COMPARED_WITH = "the same question's cold run on the server without kvkeep (float32, greedy)"


class Steps:
    """The progress bar: `now` names the step that runs, `done` counts it, `line` prints above the bar."""

    def __init__(self, progress: Progress, n_steps: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("starting", total=n_steps)

    def now(self, text: str) -> None:
        """Show which step runs."""
        self._progress.update(self._task, description=text)

    def done(self) -> None:
        """Count the step."""
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, soft_wrap=True)


@dataclass(frozen=True)
class Asking:
    """Asks two servers, `plain` (vLLM alone) and `kept` (with the connector), and shows each question in `steps`."""

    plain: Client
    kept: Client
    steps: Steps

    def warm_up(self, *clients: Client) -> None:
        """Ask each server a short other question, so that no first use of code or memory is timed."""
        for client in clients:
            self.steps.now("one short question, not timed")
            client.ask("Say hello. " * 120, 2)
            self.steps.done()

    def ask(self, index: int) -> Asked:
        """Ask a question three times: without kvkeep, cold, warm; `restarted` is the warm one until `ask_again`."""
        self.plain.reset()
        without = self._timed(self.plain, index, "without kvkeep: every token is computed")
        cold = self._timed(self.kept, index, "with kvkeep, cold: every token is computed, then stored")
        self.kept.reset()
        before = self.kept.counters()
        warm = self._timed(self.kept, index, "with kvkeep, warm: vLLM's own cache is empty, stored tokens come back")
        after = self.kept.counters()
        from_ = after.reused_since(before)
        return Asked(QUESTIONS[index], without, cold, warm, from_, pool_used_nbytes(after), warm, from_)

    def ask_again(self, index: int, asked: Asked) -> Asked:
        """Ask the question once more after the server with kvkeep has restarted."""
        before = self.kept.counters()
        restarted = self._timed(self.kept, index, "with kvkeep, after a restart: stored tokens come from disk")
        from_ = self.kept.counters().reused_since(before)
        return replace(asked, restarted=restarted, restarted_from=from_)

    def _timed(self, client: Client, index: int, doing: str) -> Answer:
        text = f"Read this text.\n\n{TEXT.read_text()}\n\nA question about the text: {QUESTIONS[index]} "
        self.steps.now(doing)
        answer = client.ask(f"{text}Answer in one sentence.", MAX_TOKENS, salt=f"question {index}")
        self.steps.done()
        return answer


def pool_used_nbytes(counters: Counters) -> int | None:
    """Return the bytes in kvkeep's pool; None where the server has no such metric."""
    used = counters.totals.get(POOL_GAUGE)
    return None if used is None else int(used)


def usable_cpus(most: int = 8) -> str:
    """Name the processors for both servers' compute threads, as vLLM wants them: "0,1"."""
    return ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:most])


def machine_name() -> str:
    """Name the processor, and how many of them the demo may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} processors"


def both_options(connector: dict[str, object]) -> tuple[ServerOptions, ServerOptions]:
    """Return the options of both servers, equal in everything but the connector."""
    config = ("--kv-transfer-config", json.dumps(connector, separators=(",", ":")))
    return (
        ServerOptions("without kvkeep", MODEL, LOGS / "without.log", usable_cpus()),
        ServerOptions("with kvkeep", MODEL, LOGS / "with.log", usable_cpus(), config),
    )


def start(stack: ExitStack, options: Sequence[ServerOptions], steps: Steps) -> list[Server]:
    """Start servers side by side and wait for all; `stack` stops them whatever happens."""
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
    """Run both servers, ask every question and show each result as it comes; DemoError if a server fails."""
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    shutil.rmtree(DISK, ignore_errors=True)  # a run does not depend on the last one
    with Progress(*columns, console=console) as progress:
        steps = Steps(progress, 6 + 4 * len(QUESTIONS))
        asked = first_start(options, steps)
        with ExitStack() as stack:
            (server,) = start(stack, options[1:], steps)
            kept = Client(HOST, server.port, MODEL.name)
            asking = Asking(kept, kept, steps)
            with answering(server):
                asking.warm_up(kept)
                asked = [asking.ask_again(index, before) for index, before in enumerate(asked)]
            for again in asked:
                steps.line(f"[bold]{again.question}[/]\n  after a restart: {again.ttft_s()['restarted']:.2f} s")
            steps.now("stopping the server")
    return asked


def first_start(options: Sequence[ServerOptions], steps: Steps) -> list[Asked]:
    """Start both servers, ask every question three times, stop both."""
    asked: list[Asked] = []
    with ExitStack() as stack:
        servers = start(stack, options, steps)
        asking = Asking(*(Client(HOST, server.port, MODEL.name) for server in servers), steps)
        with answering(*servers):
            asking.warm_up(asking.plain, asking.kept)
            for index in range(len(QUESTIONS)):
                asked.append(asking.ask(index))
                times = ", ".join(f"{kind} {asked[-1].ttft_s()[kind]:.2f} s" for kind in ("without", "cold", "warm"))
                steps.line(f"[bold]{QUESTIONS[index]}[/]\n  {escape(asked[-1].warm.text)}\n  first token: {times}")
        steps.now("stopping the servers")
    return asked


@contextmanager
def answering(*servers: Server) -> Iterator[None]:
    """Raise DemoError, with the end of its log, for a server that does not answer."""
    try:
        yield
    except AskError as error:
        for server in servers:
            server.check_alive()
        raise servers[-1].failure(f"did not answer as it should: {error}") from error


def show(about: About, asked: Sequence[Asked], console: Console) -> list[str]:
    """Print the table, write the files and return what is wrong with the result (empty: nothing)."""
    json_path, chart_path = ROOT / "demo.json", ROOT / "demo.png"
    write_json(json_path, about, asked)
    write_chart(chart_path, about, asked)
    console.print(table(about, asked))
    console.print(f"The answers are compared with {about.answers_compared_with}.", soft_wrap=True)
    console.print(f"The same as JSON:  {json_path}\nand as a chart:    {chart_path}", soft_wrap=True)
    wrong = [f"The answers differ: {a.question}" for a in asked if not a.answers_identical]
    used = [a for a in asked if a.warm.cached_tokens and a.restarted.cached_tokens]
    return wrong + [f"Nothing was reused: {a.question}" for a in asked if a not in used]


def main() -> int:
    """Run the demo; 0 if every answer was identical and used stored tokens."""
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
