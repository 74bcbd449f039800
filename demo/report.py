"""Shows what the demo measured: a table, demo.json and a chart. Knows nothing about servers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from ask import Answer
from rich.markup import escape
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

SOURCES = {
    "host": "kvkeep's pool (host memory)",
    "disk": "kvkeep's files (disk)",
    "p2p": "another kvkeep (network)",
    "external_unspecified": "the connector",
    "device": "vLLM's own prefix cache",
}
KINDS = (("without", "#9a9a9a"), ("cold", "#d9822b"), ("warm", "#2a7f62"), ("restarted", "#3c6fb0"))
KIND_LABELS = {
    "without": "without kvkeep",
    "cold": "with kvkeep, cold (nothing stored)",
    "warm": "with kvkeep, warm (vLLM's own cache emptied)",
    "restarted": "with kvkeep, after a restart of engine and store (from disk)",
}
MIB = 1 << 20


@dataclass(frozen=True)
class About:
    """What was run where; `answers_compared_with` says what an identical answer is identical to."""

    model: str
    prompt_tokens: int
    dtype: str
    answers_compared_with: str
    machine: str
    commands: dict[str, str]


@dataclass(frozen=True)
class Asked:
    """One question and its answers; `..._from` count the reused tokens by vLLM's name of their source."""

    question: str
    without: Answer
    cold: Answer
    warm: Answer
    reused_from: dict[str, int]
    pool_used_nbytes: int | None
    restarted: Answer
    restarted_from: dict[str, int]

    @property
    def answers_identical(self) -> bool:
        """True if all runs gave the same text."""
        return self.without.text == self.cold.text == self.warm.text == self.restarted.text

    def ttft_s(self) -> dict[str, float]:
        """Return the seconds to the first token of each run."""
        return {kind: round(getattr(self, kind).ttft_s, 4) for kind, _ in KINDS}


def document(about: About, asked: Sequence[Asked]) -> dict[str, object]:
    """Make the contents of demo.json."""
    questions = [
        {
            "question": a.question,
            "answer": a.warm.text,
            "answers_identical": a.answers_identical,
            "ttft_s": a.ttft_s(),
            "prompt_tokens": a.warm.prompt_tokens,
            "reused_tokens": a.warm.cached_tokens,
            "reused_from": in_words(a.reused_from),
            "reused_tokens_restarted": a.restarted.cached_tokens,
            "reused_from_restarted": in_words(a.restarted_from),
            "pool_used_nbytes": a.pool_used_nbytes,
        }
        for a in asked
    ]
    return {**asdict(about), "questions": questions}


def in_words(sources: dict[str, int]) -> str:
    """Say where reused tokens came from."""
    return " + ".join(SOURCES.get(name, name) for name in sources) or "nowhere"


def write_json(path: Path, about: About, asked: Sequence[Asked]) -> None:
    """Write demo.json."""
    path.write_text(json.dumps(document(about, asked), indent=2, ensure_ascii=False) + "\n")


def table(about: About, asked: Sequence[Asked]) -> Table:
    """Make a table with a row for each question."""
    shown = Table(
        title=f"{about.model}: seconds to the first token of an answer about {about.prompt_tokens:,} tokens",
        show_lines=True,
    )
    shown.add_column("question and answer", ratio=5)
    for heading in (
        "without\nkvkeep",
        "kvkeep\ncold",
        "kvkeep\nwarm",
        "after a\nrestart",
        "without\n/ warm",
        "tokens\nreused",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("reused from", ratio=2)
    shown.add_column("answers", justify="center")
    shown.add_column("bytes\nheld", justify="right", no_wrap=True)
    for a in asked:
        held = "not told" if a.pool_used_nbytes is None else f"{a.pool_used_nbytes / MIB:.0f} MiB"
        shown.add_row(
            f"{a.question}\n[italic]{escape(a.warm.text)}[/]",
            *(f"{a.ttft_s()[kind]:.2f}" for kind, _ in KINDS),
            f"{a.without.ttft_s / a.warm.ttft_s:.0f}x",
            f"{a.warm.cached_tokens:,}",
            f"{in_words(a.reused_from)}; after the restart {in_words(a.restarted_from)}",
            "[green]identical[/]" if a.answers_identical else "[bold red]differ[/]",
            held,
        )
    return shown


def write_chart(path: Path, about: About, asked: Sequence[Asked]) -> None:
    """Write a bar chart as PNG: for each question and run a bar with its seconds, on a logarithmic scale."""
    figure, axes = plt.subplots(figsize=(2.6 * len(asked) + 2.4, 5.4), dpi=120, layout="constrained")
    width = 0.8 / len(KINDS)
    for index, (kind, colour) in enumerate(KINDS):
        values = [a.ttft_s()[kind] for a in asked]
        lefts = [i + (index - (len(KINDS) - 1) / 2) * width for i in range(len(asked))]
        bars = axes.bar(lefts, values, width * 0.92, color=colour, label=KIND_LABELS[kind])
        axes.bar_label(bars, [f"{v:.2f} s" for v in values], padding=2, fontsize=9)
    axes.set_yscale("log")
    lowest = min(min(a.ttft_s().values()) for a in asked)
    highest = max(max(a.ttft_s().values()) for a in asked)
    axes.set_ylim(lowest / 2, highest * 2)
    axes.set_xticks(range(len(asked)), [textwrap.fill(a.question, 30) for a in asked], fontsize=9)
    axes.set_ylabel("seconds to the first token (log scale)")
    axes.set_title(f"{about.model}, {about.prompt_tokens:,} prompt tokens, {about.dtype}\n{about.machine}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)
