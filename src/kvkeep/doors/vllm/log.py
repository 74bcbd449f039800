"""Writes kvkeep's log lines where vLLM writes its own, each once, until the last engine of the process has ended.

Looks up vLLM's logger for each line, since vLLM may configure its logging again.
"""

from __future__ import annotations

import logging

log = logging.getLogger("kvkeep")


class BesideVllm(logging.Handler):
    """Hands each record to vLLM's logger; remembers how many engines use it, and how kvkeep's logger was before."""

    def __init__(self) -> None:
        super().__init__()
        self.users = 0
        self._before = (log.level, log.propagate)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record where vLLM writes."""
        logging.getLogger("vllm").handle(record)

    def put_back(self) -> None:
        """Leave kvkeep's logger as it was."""
        log.removeHandler(self)
        log.setLevel(self._before[0])
        log.propagate = self._before[1]


def join_log(level: str) -> None:
    """Write kvkeep's lines of this level and above where vLLM's go, and to handlers of kvkeep's own.

    A call of `leave_log` undoes a call of this.
    """
    beside = _beside() or BesideVllm()
    beside.users += 1
    log.addHandler(beside)
    log.setLevel(level.upper())
    log.propagate = False  # a handler of the root logger would write every line again


def leave_log() -> None:
    """Count an engine as ended; after the last one put kvkeep's logger back as it was."""
    beside = _beside()
    if beside is not None:
        beside.users -= 1
        if not beside.users:
            beside.put_back()


def _beside() -> BesideVllm | None:
    return next((handler for handler in log.handlers if isinstance(handler, BesideVllm)), None)
