"""Times cases beside their yardsticks, and shows the rows as a table or a JSON file, with the machine they ran on.
Knows nothing about what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from kvkeep.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One case: our runs and the yardstick's, in `unit`.

    `ratio` is our median to the yardstick's, `ratio_of_best` the same of the best runs (less sensitive to a busy
    machine); `better` says whether a lower or a higher ratio is the better one; `goal` is the ratio (or, where it names
    a unit, the value) that was asked for.
    """

    case: str
    unit: str
    runs: int
    min: float
    median: float
    max: float
    yardstick: str
    ratio: float
    better: str
    ratio_of_best: float
    yardstick_min: float
    yardstick_median: float
    yardstick_max: float
    goal: str = ""


@dataclass(frozen=True)
class Case:
    """What is compared: its name, its unit, its yardstick, which ratio is better and what was asked for."""

    name: str
    unit: str
    yardstick: str
    better: str = "lower"
    goal: str = ""

    def row(self, ours: Sequence[float], theirs: Sequence[float]) -> Row:
        """The row of these runs."""
        best = min if self.better == "lower" else max
        return Row(
            case=self.name,
            unit=self.unit,
            runs=len(ours),
            min=min(ours),
            median=median(ours),
            max=max(ours),
            yardstick=self.yardstick,
            ratio=median(ours) / median(theirs),
            better=self.better,
            ratio_of_best=best(ours) / best(theirs),
            yardstick_min=min(theirs),
            yardstick_median=median(theirs),
            yardstick_max=max(theirs),
            goal=self.goal,
        )


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(action: Callable[[], object]) -> float:
    """The CPU time of this thread in one call: for work that waits for nobody; other processes disturb it less."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def alternate(runs: int, *measures: Callable[[], float]) -> list[list[float]]:
    """The results of `measures`, each called `runs` times, in turn: A B A B. One round before that is not counted."""
    for measure in measures:
        measure()
    results: list[list[float]] = [[] for _ in measures]
    for _ in range(runs):
        for place, measure in enumerate(measures):
            results[place].append(measure())
    return results


def expect(holds: bool, what: str) -> None:
    """RuntimeError unless it holds, also under `python -O`: figures of work that went wrong are worse than none."""
    if not holds:
        raise RuntimeError(f"the benchmark is broken: {what}")


def say(text: str) -> None:
    """Prints a line of progress at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """The machine and how busy it is, in one line."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} x {names[0] if names else platform.machine()}, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def run_groups(groups: Mapping[str, Callable[[], list[Row]]], title: str, description: str | None) -> None:
    """A benchmark script: runs the groups that `--only` names (all), shows their rows, writes them to `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made: list[Row] = []
    for name in options.only:
        say(f"{name} ...")
        made += groups[name]()
    show(made, title)
    write(made, options.json)


def show(rows: Sequence[Row], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, caption=machine(), title_justify="left", caption_justify="left")
    for name in ("case", "unit", "runs", "min", "median", "max", "yardstick", "its median", "ratio", "of best", "goal"):
        table.add_column(name, justify="left" if name in ("case", "unit", "yardstick", "goal") else "right")
    for row in rows:
        arrow = "↓" if row.better == "lower" else "↑"
        figures = [f"{value:.4g}" for value in (row.min, row.median, row.max)]
        ratios = [f"{row.ratio:.3f} {arrow}", f"{row.ratio_of_best:.3f} {arrow}"]
        its = f"{row.yardstick_median:.4g}"
        table.add_row(row.case, row.unit, str(row.runs), *figures, row.yardstick, its, *ratios, row.goal)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print("ratio: ours to the yardstick's, of the medians and of the best runs; ↓ lower is better, ↑ higher is better")


def check_target(file: Path) -> None:
    """Raise ConfigError unless rows can be written to this file, before minutes are spent on them.

    What is there and is no list of rows is not overwritten.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8") as opened:
            opened.seek(0)
            old = json.loads(opened.read() or "[]")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--json {file}: no rows can be written there: {error}") from error
    if not (isinstance(old, list) and all(isinstance(row, dict) and "case" in row for row in old)):
        raise ConfigError(f"--json {file}: it holds something else than rows and stays as it is")


def write(rows: Sequence[Row], file: Path | None, keeps: bool = False) -> None:
    """Writes the rows as a JSON list, each with the machine and the command; does nothing without a file.

    `keeps`: the file's rows of other cases stay, for what takes long and is measured in parts.
    """
    if file is None:
        return
    old = json.loads(file.read_text() or "[]") if keeps and file.exists() else []
    others = [row for row in old if row["case"] not in {new.case for new in rows}]
    program = Path(sys.argv[0])
    command = shlex.join(["python", *sys.argv] if program.suffix == ".py" else [program.name, *sys.argv[1:]])
    file.parent.mkdir(parents=True, exist_ok=True)
    where = {"machine": machine(), "command": command}
    file.write_text(json.dumps([*others, *({**asdict(row), **where} for row in rows)], indent=1) + "\n")
    say(f"{len(rows)} rows in {file}")
