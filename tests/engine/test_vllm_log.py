"""kvkeep's lines beside vLLM's: each once, wherever vLLM writes, however often engines start in one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kvkeep.doors.vllm.log import join_log, leave_log


class Kept(logging.Handler):
    """Keeps the lines that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def loggers() -> Iterator[dict[str, logging.Logger]]:
    """The loggers "", "vllm" and "kvkeep", as they are in a fresh process; put back afterwards."""
    found = {name: logging.getLogger(name) for name in ("", "vllm", "kvkeep")}
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in found.values()]
    for name in ("vllm", "kvkeep"):
        found[name].handlers[:] = []
        found[name].setLevel(logging.NOTSET)
        found[name].propagate = True
    yield found
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def root(loggers: dict[str, logging.Logger]) -> Kept:
    """What a program, or a model's own `logging.warning`, has put on the root logger."""
    kept = Kept()
    loggers[""].addHandler(kept)
    return kept


def configure(vllm: logging.Logger) -> Kept:
    """vLLM's logging as it configures it: a handler of its own, and nothing goes on to the root."""
    kept = Kept()
    vllm.handlers[:] = [kept]
    vllm.propagate = False
    return kept


def test_a_line_is_written_once_where_vllm_writes(loggers: dict[str, logging.Logger], root: Kept) -> None:
    vllm = configure(loggers["vllm"])
    join_log("info")
    loggers["kvkeep"].info("one line")
    logging.getLogger("kvkeep.store").info("one of below")
    loggers["kvkeep"].debug("too fine")
    assert (vllm.lines, root.lines) == (["one line", "one of below"], [])


def test_a_second_engine_in_the_process_adds_nothing(loggers: dict[str, logging.Logger], root: Kept) -> None:
    configure(loggers["vllm"])
    join_log("info")
    later = configure(loggers["vllm"])  # vLLM was configured again: its old handler writes nowhere any more
    join_log("debug")
    loggers["kvkeep"].debug("one line")
    assert (later.lines, root.lines, len(loggers["kvkeep"].handlers)) == (["one line"], [], 1)


def test_where_vllm_configures_no_logging_a_line_goes_where_vllms_go(
    loggers: dict[str, logging.Logger], root: Kept
) -> None:
    join_log("info")
    loggers["kvkeep"].info("one line")
    assert root.lines == ["one line"]


def test_when_the_last_engine_has_ended_the_log_is_as_it_was(loggers: dict[str, logging.Logger], root: Kept) -> None:
    vllm = configure(loggers["vllm"])
    own = Kept()
    loggers["kvkeep"].addHandler(own)
    loggers["kvkeep"].setLevel("WARNING")
    join_log("info")
    join_log("info")
    leave_log()
    loggers["kvkeep"].info("one still runs")
    leave_log()
    leave_log()
    loggers["kvkeep"].info("nobody asked for this")
    loggers["kvkeep"].warning("as before")
    assert (vllm.lines, root.lines) == (["one still runs"], ["as before"])
    assert own.lines == ["one still runs", "as before"]
    assert loggers["kvkeep"].handlers == [own]
